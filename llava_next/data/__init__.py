"""From a data set on disk to packed micro-batches: four rooms that only look down (loading, plan, format, storage)."""
