"""What a run continues from: written aside, complete or absent.

saving.py: `Checkpoints`: written while training goes on
sharded.py: tensors on disk, one file a rank
recovery.py: which checkpoint a run continues from
mirror.py: copies at a URL

May import: the root's files, data.storage, model.folders, training.devices, training.recipe, training.watch.
"""
