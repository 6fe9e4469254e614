"""From records or a data set to packed micro-batches: five rooms (loading, plan, inputs, format, storage)."""
