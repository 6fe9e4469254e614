"""Which samples make up a step, and which rank computes them: pure functions of the index and the seed.

order.py: the order of an epoch
dealing.py: a step dealt to ranks and micro-batches
legs.py: what is left of an epoch when the plan changes
mixture.py: the data sets of a run as one plan
profile.py: a published data set by its sizes and lengths alone

May import: the root's files, data.format, data.inputs, data.storage.
"""
