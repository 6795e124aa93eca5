"""One table from Hugging Face tensors to Megatron parameters, and its uses: load, stream, export.

entries.py says what becomes what, kinds.py how tensors are cut and merged. Knows no model class, only parameters by
name.
"""
