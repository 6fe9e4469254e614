"""Parts of `build_shards.py` and `index_shards.py`: from published data to shards.

inputs.py: what the command line names, and expected counts
embedded.py: inputs that hold their pictures: parquet, shards of others
cutting.py: pictures of a record as strips of tiles
jobs.py: a build as a plan of shards that stand alone
shard_walk.py: whole shards read once, strictly
adding_lengths.py: exact text lengths, added to a data set

May import: the root's files, data.format, data.inputs, data.storage.
"""
