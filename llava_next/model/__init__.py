"""The model: what is trained (forward) and the folders that hold it (folders)."""
