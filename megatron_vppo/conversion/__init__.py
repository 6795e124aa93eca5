"""`vppo convert`: checkpoints between Hugging Face's format and Megatron's, without a model in memory.

to_megatron.py and to_hf.py are the two directions, verify.py and logprobs.py the comparisons. See docs/conversion.md.
"""
