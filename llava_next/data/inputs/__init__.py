"""What people have before there are shards: records in JSON files with pictures beside them, listed and measured.

listing.py: where each sample of a file or a mixture lies, in one pass
json_stream.py: the elements of a JSON file, one by one
samples.py: a record becomes a sample, pictures by their headers; what is left out, and why
text_lengths.py: exact lengths of a sample
unbuilt.py: the data set that would be built, as a plan takes it

May import: the root's files, data.format.
"""
