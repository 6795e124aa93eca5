"""`vppo train`: one training run.

loop.py is one step, in the order of the paper. run.py opens and closes a run. The other files are parts that the loop
drives.
"""
