"""The data of a run: rows and prompts, images and their perturbation, rewards.

dataset.py reads rows, prompts.py tokenises them, images.py makes pixels of an image reference, reward_pool.py grades.
"""
