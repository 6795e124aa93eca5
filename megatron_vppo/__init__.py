"""VPPO (Visually-Perceptive Policy Optimization, arXiv 2510.09285) for Qwen-VL models on Megatron Core."""

from megatron_vppo.system.cudnn import share_cudnn_of_torch

__version__ = "0.1.0"

# Megatron imports TransformerEngine, and every module of ours that imports Megatron comes after this one.
share_cudnn_of_torch()
