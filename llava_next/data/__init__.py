"""From shards to packed batches. Imports templates and anyres, never the model."""
