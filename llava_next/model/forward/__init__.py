"""The model that is trained: transformers' LLaVA-NeXT with one more forward path.

modeling.py: `LlavaNextForConditionalGeneration` with the packed forward
attention.py: causal attention by segment
fused.py: norms, SwiGLU and rotary embedding by Liger's kernels
kinds.py: what must be known of a kind of tower or language model
head.py: the LM head whose forward is the loss
lora.py: low-rank adapters by peft, and their dropout
nf4.py: frozen matrices in 4 bits by bitsandbytes, as FSDP2 shards them

May import: the root's files.
"""
