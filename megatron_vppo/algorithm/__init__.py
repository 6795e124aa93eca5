"""The formulas of VPPO, as functions of tensors and named numbers, and the records that the phases of a step exchange.

Start with types.py and assemble.py; docs/algorithm.md has the equations. Imports torch and the standard library, no
configuration, no process group, no model.
"""
