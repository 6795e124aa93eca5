"""A task of longer answers: a table of handwritten digits, read cell by cell with a running total.

make_data.py and make_model.py are the programs; examples/tables_cpu trains on what they write. What they share with the
task of two digits lies in tools/digits.
"""
