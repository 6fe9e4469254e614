"""What a run continues from: written aside, complete or absent.

saving.py: `Checkpoints`: written while training goes on
sharded.py: tensors on disk, one file a rank
recovery.py: which checkpoint a run continues from
holding.py: one run at a time in a place
mirror.py: copies at a URL

May import: data.storage, model.folders, training.devices, training.recipe, training.watch.
"""
