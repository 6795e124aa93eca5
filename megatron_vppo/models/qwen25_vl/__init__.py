"""Qwen2.5-VL on Megatron Core."""
