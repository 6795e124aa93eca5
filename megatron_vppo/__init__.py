"""VPPO (Visually-Perceptive Policy Optimization, arXiv 2510.09285) for Qwen-VL models on Megatron Core."""

__version__ = "0.1.0"
