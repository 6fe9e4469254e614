"""What a run says about itself, and what keeps it alive.

journal.py: metrics.jsonl and console, and numbers for the trackers
trackers.py: wandb and tensorboard, which may fail
metrics.py: lines and numbers of it
timing.py: what the device tells of a step, without waiting for more than it
health.py: skipped updates, heartbeats, garbage collection
profile.py: traces of chosen steps
beside.py: commands that run beside it, and end with it
stopping.py: why a run is to stop before its end
memory.py: memory that was not enough, said and remembered
launcher.py: one message at the end, through the launcher too

May import: data.loading, data.plan, data.storage, training.devices, training.forecast, training.recipe.
"""
