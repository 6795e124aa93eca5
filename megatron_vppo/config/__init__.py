"""The settings of a run.

schema.py declares them, checks.py refuses combinations that cannot work, load.py reads YAML and overrides. choices.py
holds every set of choices once; every other room may import it, and only it.
"""
