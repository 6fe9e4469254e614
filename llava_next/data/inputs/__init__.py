"""What people have before there are shards: records in JSON files with pictures beside them, listed and measured.

listing.py: where each sample of a file or a mixture lies, in one pass
json_stream.py: the elements of a JSON file, one by one
text_lengths.py: exact text lengths of a sample

May import: the root's files, data.format.
"""
