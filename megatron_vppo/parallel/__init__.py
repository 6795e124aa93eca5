"""Megatron's engine: the only room that builds process groups or calls a pipeline schedule.

layout.py builds the groups; policy.py is what the loop drives, made of scorer.py and updater.py over schedule.py;
vocab_head.py turns hidden states into log-probs.
"""
