"""The settings of a run.

schema.py declares them, checks.py refuses combinations that cannot work, load.py reads YAML and overrides. choices.py
holds every set of choices once. Rooms that read no configuration may import it, and nothing else of this room.
"""
