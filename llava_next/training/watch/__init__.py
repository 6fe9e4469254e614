"""What a run says about itself, and what keeps it alive.

journal.py: metrics.jsonl, trackers and console
metrics.py: lines and numbers of it
timing.py: seconds of the parts of a step
health.py: skipped updates, heartbeats, garbage collection
profile.py: traces of chosen steps

May import: data.loading, data.plan, training.forecast, training.recipe.
"""
