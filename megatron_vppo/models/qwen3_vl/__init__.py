"""Qwen3-VL (dense) on Megatron Core."""
