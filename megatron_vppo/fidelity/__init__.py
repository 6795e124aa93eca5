"""`vppo fp8-fidelity`: what FP8 changes in the tokens that VPPO picks. See docs/fp8.md.

measure.py scores the same responses in each precision, compare.py finds the differences, figures.py sums them up for
fidelity.json, page.py draws them. emulation.py stands in for a GPU.
"""
