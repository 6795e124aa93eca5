"""`vppo import-config`: settings of VPPO-RL and EasyR1 become ours. See docs/import.md.

easyr1_keys.py and actor_keys.py are the table: every key of theirs with its default and what becomes of it, by the
rules of rules.py and the functions of input_rules.py and training_rules.py. sources.py reads their files,
shell_script.py their scripts, import_config.py goes through the table.
"""
