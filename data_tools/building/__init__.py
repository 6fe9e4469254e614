"""Parts of `build_shards.py` and `index_shards.py`: from published data to shards.

inputs.py: inputs listed in one pass: JSON files and mixtures
json_stream.py: the elements of a JSON file, one by one
embedded.py: inputs that hold their pictures: parquet, shards of others
cutting.py: a record becomes a sample: text checked, pictures cut
jobs.py: a build as a plan of shards that stand alone
shard_walk.py: whole shards read once, strictly
text_lengths.py: exact text lengths of a sample
adding_lengths.py: the same, added to a data set
progress.py: worker processes, and how far they are

May import: the root's files, data.format, data.plan, data.storage.
"""
