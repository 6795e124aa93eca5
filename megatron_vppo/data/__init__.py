"""The data of a run: rows and prompts, images and their perturbation, rewards.

dataset.py reads rows, prompts.py tokenises them, images.py makes pixels of an image reference, reward_pool.py grades,
with the built-in graders of graders/ or a function of the user's.
"""
