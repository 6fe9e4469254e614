"""What a run continues from: written aside, complete or absent.

saving.py: `Checkpoints`: written while training goes on
sharded.py: tensors on disk, one file a rank
recovery.py: which checkpoint a run continues from
same_run.py: whether it is of this run, and what changed since
verifying.py: every byte compared before it is loaded
holding.py: one run at a time in a place
mirror.py: copies at a URL
exports.py: the model written, or said why not

May import: the root's files, data.storage, model.folders, training.devices, training.recipe, training.watch.
"""
