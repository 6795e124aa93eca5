"""The built-in graders, one module each, named by reward.reward_function: a response and its ground truth in, a `Grade`
out. weighted.py finds them by name and adds them up.

Imported by reward workers: nothing here may import torch.
"""
