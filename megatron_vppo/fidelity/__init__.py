"""`vppo fp8-fidelity`: what FP8 changes in the tokens that VPPO picks. See docs/fp8.md.

measure.py scores the same responses in each precision, compare.py computes the figures, emulation.py stands in for the
GPU.
"""
