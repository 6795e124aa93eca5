"""`vppo plan`: the sizes of a model and the memory of each layout, by arithmetic alone. See docs/plan.md.

layouts.py lists the layouts that fit, state.py and activations.py count bytes, engine_share.py sizes the engines.
"""
