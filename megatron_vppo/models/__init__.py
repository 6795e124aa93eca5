"""Qwen2.5-VL and Qwen3-VL in layers of Megatron Core. Knows layers, and no ranks beyond the groups it is given.

qwen_vl.py joins the towers; a family's folder holds what differs. build.py makes one pipeline stage.
"""
