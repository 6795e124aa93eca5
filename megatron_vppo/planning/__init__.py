"""`vppo plan`: the memory of each layout and the seconds of a step, by arithmetic alone. See docs/plan.md.

layouts.py lists the layouts that fit, state.py and activations.py count bytes, engine_share.py sizes the engines.

Seconds: gpus.py has the ceilings of a GPU, assumptions.py what is assumed beyond them, step_flops.py counts FLOPs,
sampling_seconds.py, training_seconds.py and step_seconds.py make seconds of them, timed_layouts.py orders layouts,
simulate.py changes the number of GPUs.
"""
