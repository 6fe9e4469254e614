"""What a run is told: its configuration, what is trained and at which rate.

config.py: typed options, from YAML and the command line
checks.py: what of them cannot work
evaluate.py: options of the scoring beside it, and what of them cannot work
optim.py: modules, rates, optimizer and schedule
low_memory.py: AdamW with 8-bit moments, and for bf16 parameters

May import: the root's files, model.forward, training.devices.
"""
