"""The run. The files here tell its story; each room under it has one job and knows nothing of the story.

setup.py: what the training scripts put together
stand_ins.py: what a plan takes for a model that is not at hand
planning.py: what is left to the machine, picked and kept
banner.py: the plan of a run, printed before it starts
banner_machine.py: its part on the machine: memory, what is picked, the command
loop.py: the training loop
validate.py: held-out loss
scoring.py: the model scored while it trains
scores.py: scores in the run folder, and the best model
readiness.py: what the end of a run needs, before its first step
provenance.py: what a run was made with, for its card and the ledger
pushing.py: the result on the hub
ending.py: what a rank says last, and its exit status

May import: the root's files, data.inputs, data.loading, data.plan, data.storage, model.folders, model.forward,
training.checkpoints, training.devices, training.forecast, training.recipe, training.watch.
"""
