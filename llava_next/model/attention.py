"""Causal attention over a flat sequence of segments.

Registered with transformers under the name `segment`, so that the stock decoder layers call it: the packed forward
passes `cu_seq_lens_q` and `max_length_q` down to the layers, and no T x T mask is ever built. Without those arguments
(generate, the stock forward) it is transformers' own SDPA attention.
"""

import inspect
from functools import cache

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENT_ATTENTION = "segment"


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attends causally inside each segment and never across.

    Args:
        query: `[1, heads, T, head_dim]`; key and value `[1, kv_heads, T, head_dim]`.
        cu_seq_lens_q: int32 `[G+1]`, segment borders in the flat sequence; absent: plain SDPA with `attention_mask`.
        max_length_q: the longest segment, a Python int so that no kernel has to ask the device for it.

    Returns:
        `[1, T, heads, head_dim]` and None (attention weights are never materialised).
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.is_cuda:
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    return _sdpa_per_segment(query, key, value, cu_seq_lens_q, scaling), None


def _sdpa_per_segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    # One SDPA call a segment is the same arithmetic as the sample alone, so packing is exact on a CPU. `split` rather
    # than slices: the backward of a split is one concatenation, that of a slice a full-size buffer each.
    lengths = cu_seqlens.diff().tolist()
    outputs = [
        F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


@cache
def _varlen_options(grouped: bool) -> dict:
    """How this torch release spells causal and grouped-query attention (2.11 to 2.13 differ)."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if grouped and "enable_gqa" in known:
        options["enable_gqa"] = True
    return options


def _varlen(query, key, value, cu_seqlens: torch.Tensor, max_length: int, scaling: float | None) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped = query.shape[1] != key.shape[1]
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    options = _varlen_options(grouped)
    if grouped and "enable_gqa" not in options:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if scaling is not None:
        options = {**options, "scale": scaling}
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, **options).unsqueeze(0)


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
# The stock path under this name needs the masks that SDPA needs; the packed path builds none.
AttentionMaskInterface.register(SEGMENT_ATTENTION, sdpa_mask)
