"""`vppo train`: one training run.

loop.py is a step, in the paper's order. run.py opens and closes a run; the other files are what the loop drives.
"""
