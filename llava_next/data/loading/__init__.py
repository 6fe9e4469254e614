"""Requests become packed micro-batches, in worker processes, ahead of the loop.

loader.py: requests read, encoded and packed
encode.py: a sample's bytes to ids, labels, tiles and gather
batch.py: `PackedBatch`, and how samples become one
feed.py: the steps of a rank, loaded ahead by a thread
preload.py: what the process holds that workers are forked from
stall.py: a file that says what a process was doing when work stood still

May import: the root's files, data.format, data.plan, data.storage.
"""
