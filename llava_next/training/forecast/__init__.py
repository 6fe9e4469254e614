"""Memory and work of a step before anything is loaded.

flops.py: floating-point operations of a step
activations.py: what a forward leaves for its backward
budget.py: memory of a rank by part
speed.py: seconds of a step
picking.py: checkpointing and budgets that take the least time and fit
fitting.py: what would fit where a plan does not

May import: data.plan, model.forward, training.devices, training.recipe.
"""
