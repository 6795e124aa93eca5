"""An image task that anyone can build offline: the sum of two handwritten digits, and a small model to begin with.

make_data.py and make_model.py are the programs; examples/digits_cpu trains on what they write. tools/tables shares
their parts.
"""
