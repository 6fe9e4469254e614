"""Memory and work of a step before anything is loaded.

flops.py: floating-point operations of a step
activations.py: what a forward leaves for its backward
budget.py: memory of a rank by part, and the policy that fits best

May import: data.plan, model.forward, training.devices, training.recipe.
"""
