"""What lies on disk: shards of samples, their index, strict reading and writing.

dataset.py: `dataset.json`: geometry, totals and the list of shards
index.py: `index.parquet`: where each sample lies and how large it is
lazy_index.py: the same, read window by window
shards.py: one sample in a tar: its members, its strip of tiles
tar.py: tar headers, read strictly
writer.py: shards and index, complete or absent
pictures.py: pictures and samples as others wrote them
records.py: a record of any form in the stored form
picture_forms.py: paths, embedded bytes and data URLs under any key

May import: the root's files, data.storage.
"""
