"""The model: transformers' LLaVA-NeXT with one more forward path, its composition from parts, and its files."""
