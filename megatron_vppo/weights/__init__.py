"""One table from Hugging Face tensors to Megatron parameters, and its uses: load, stream, export.

kinds.py says how tensors are cut and merged. Knows no model class, only parameters by name.
"""
