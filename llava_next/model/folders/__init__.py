"""Model folders: composed from parts, written, and proven whole.

compose.py: a tower and a language model become one folder
sources.py: where their weights come from
dry.py: architectures that need no download
companions.py: tokenizer, processor, chat template, generation config
card.py: what a folder says of itself on the hub
export.py: weights and config in the llava-hf layout
check.py: a folder proven without loading its weights
starting.py: a folder that training may start from
adapters.py: adapter folders, and the base that one is for
merging.py: an adapter put into its base
check_adapter.py: proofs of an adapter folder

May import: the root's files, model.forward.
"""
