"""Megatron's engine: the only room that builds process groups or calls a pipeline schedule.

layout.py builds the groups, policy.py scores and updates, vocab_head.py turns hidden states into log-probs.
"""
