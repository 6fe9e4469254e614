"""The machine, and the processes that share it.

hardware.py: what a device computes and holds; the machine a plan is made for
launch.py: what the file given to `accelerate launch` may ask for
parallel.py: Accelerator and FSDP2, made to hold for this model
float8.py: linear layers in float8, by torchao
agreement.py: what the ranks tell each other about a step

May import: the root's files, data.loading, data.storage, model.forward.
"""
