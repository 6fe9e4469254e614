"""Bytes from anywhere: ranged reads and whole writes, with retries and a cache.

client.py: `Storage`: a folder of objects on disk, S3, Google Cloud, Azure, a web server or the hub
objects.py: one request at a time, through obstore
hub.py: Hugging Face data sets, through huggingface_hub's cache
cache.py: ranges that were read, kept in a local folder
lease.py: one writer at a time
errors.py: what can go wrong with a read

May import: the root's files.
"""
