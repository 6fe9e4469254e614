"""Causal attention over a flat sequence of segments.

Registered with transformers under the name `segment`, so that the stock decoder layers call it: the packed forward
passes `cu_seq_lens_q` and `max_length_q` down to the layers, and no T x T mask is ever built. Without those arguments
(generate, the stock forward) it is transformers' own SDPA attention.

What computes it: torch's variable-length attention (CUDA), by FlashAttention 3 where its package is installed (Hopper),
else by the FlashAttention 2 that torch brings; the flash-attn package (CUDA, when asked for); one SDPA call a segment
(anywhere; exact, and the only one for float32). Keys and values that several query heads share are never repeated.
`choose_attention` picks one and says why.
"""

import importlib.util
import inspect
from functools import cache, partial

import torch
from torch.nn import attention as torch_attention
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENT_ATTENTION = "segment"

# Names in transformers' registry. None holds "flash" or "sdpa": transformers reads those words as its own kernels.
KERNEL_NAMES = {"fa3": "segment_fa3", "varlen": "segment_varlen", "flash": "segment_fa", "sdpa": "segment_loop"}
SEGMENT_NAMES = (SEGMENT_ATTENTION, *KERNEL_NAMES.values())
HALF = (torch.bfloat16, torch.float16)
FA3_MODULE = "flash_attn_interface"  # of the package flash_attn_3: what torch imports


def choose_attention(wanted: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> tuple[str, str]:
    """The kernel that segment attention will run on, and the reason, for the run's plan.

    `fa3` puts FlashAttention 3 in the place of torch's own for this process, in the tower's SDPA too; any other choice
    takes it away again.

    Args:
        wanted: `auto`, or `fa3`, `varlen`, `flash` or `sdpa` to insist on one.
        device: where the model runs.
        dtype: of queries and keys: what the model computes in.

    Returns:
        (name, reason); the name is a key of `KERNEL_NAMES`. See `attention_names`.

    Raises:
        ValueError: an unknown name, or a kernel that cannot run here; the message says what would help.
    """
    if wanted not in ("auto", *KERNEL_NAMES):
        raise ValueError(f"attn_implementation: {wanted!r} is none of auto, {', '.join(KERNEL_NAMES)}")
    device = torch.device(device)
    _take_fa3_away()
    if wanted == "sdpa":
        # reading the segment borders stops the host until the device has caught up, once a layer
        cost = ", slow on a GPU: it waits for the segment borders in every layer" if device.type == "cuda" else ""
        return "sdpa", f"asked for: one SDPA call a segment{cost}"
    obstacle = _obstacle(device, dtype)
    if obstacle is not None and wanted == "auto":
        return "sdpa", f"one SDPA call a segment: {obstacle}"
    if obstacle is not None:
        raise ValueError(f"attn_implementation: {wanted} cannot run here: {obstacle}; set it to auto or sdpa")
    if wanted in ("auto", "fa3"):
        missing = _activate_fa3(device)
        if missing is None:
            return "fa3", f"FlashAttention 3 by torch's variable-length attention{', asked for' * (wanted == 'fa3')}"
        if wanted == "fa3":
            raise ValueError(f"attn_implementation: fa3 cannot run here: {missing}; set it to auto or varlen")
        return "varlen", f"torch's own variable-length kernel; not FlashAttention 3: {missing}"
    if wanted == "flash":
        if importlib.util.find_spec("flash_attn") is None:
            raise ValueError(
                "attn_implementation: flash needs the package flash-attn, which is not installed; install it with "
                "`pip install flash-attn --no-build-isolation`, or set auto: torch's own kernel is the same algorithm"
            )
        return "flash", "asked for: the flash-attn package"
    return "varlen", "asked for: torch's own variable-length kernel"


def attention_names(kernel: str) -> dict[str, str]:
    """`from_pretrained`'s `attn_implementation` for a kernel that `choose_attention` returned.

    The vision tower always runs plain SDPA: all its sequences are equally long.
    """
    return {"text_config": KERNEL_NAMES[kernel], "vision_config": "sdpa"}


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no variable-length kernel can run on this device in this dtype; None when it can."""
    if device.type != "cuda":
        return f"variable-length kernels are for CUDA, the device is {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere (compute capability 8.0)"
    if dtype not in HALF:
        return f"variable-length kernels take bfloat16 and float16, the model computes in {dtype}"
    return None


def _take_fa3_away() -> None:
    current = getattr(torch_attention, "current_flash_attention_impl", None)  # torch from 2.11 on, in part
    if current is not None and current() == "FA3":
        torch_attention.restore_flash_attention_impl()


def _activate_fa3(device: torch.device) -> str | None:
    """Has torch compute flash attention by FlashAttention 3; returns why it cannot, None when it does from now on."""
    if torch.cuda.get_device_capability(device)[0] != 9:  # torch would take it here, and fail in the first forward
        return f"{torch.cuda.get_device_name(device)} is no Hopper (compute capability 9)"
    if not hasattr(torch_attention, "restore_flash_attention_impl"):
        return f"torch {torch.__version__} has no place for it"
    if importlib.util.find_spec(FA3_MODULE) is None:
        return f"the package flash_attn_3 (module {FA3_MODULE}) is not installed"
    try:
        torch_attention.activate_flash_attention_impl("FA3")
    except Exception as error:  # built for another torch or CUDA, or without a backward: whatever its import raises
        return f"{FA3_MODULE} does not load ({type(error).__name__}: {error})"
    return None


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
    sliding_window: int | None = None,
    kernel: str | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attends causally inside each segment and never across, within the layer's window where it has one.

    Args:
        query: `[1, heads, T, head_dim]`; key and value `[1, kv_heads, T, head_dim]`.
        cu_seq_lens_q: int32 `[G+1]`, segment borders in the flat sequence; absent: plain SDPA with `attention_mask`.
        max_length_q: the longest segment, a Python int so that no kernel has to ask the device for it.
        scaling: of the scores; None: 1 / sqrt(head_dim).
        sliding_window: how many tokens, itself among them, a token sees; None: all before it.
        kernel: as `choose_attention` names it; None: varlen for half precision on CUDA, else sdpa.

    Returns:
        `[1, T, heads, head_dim]` and None (attention weights are never materialised).

    Raises:
        ValueError: dropout on attention weights, or scores that are to be capped.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"attention_dropout is {dropout}: packed training has none; set it to 0 in config.json")
    if kwargs.get("softcap") is not None:
        raise ValueError(f"softcap is {kwargs['softcap']}: segment attention caps no scores; take a model without")
    if sliding_window is not None and sliding_window >= max_length_q:
        sliding_window = None
    kernel = kernel or ("varlen" if query.is_cuda and query.dtype in HALF else "sdpa")
    return _KERNELS[kernel](query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None


def _sdpa_per_segment(query, key, value, cu_seqlens, max_length: int, scaling: float | None, window: int | None):
    # One SDPA call a segment is the same arithmetic as the sample alone, so packing is exact on a CPU. `split` rather
    # than slices: the backward of a split is one concatenation, that of a slice a full-size buffer each.
    lengths = cu_seqlens.diff().tolist()
    seen = None
    if window is not None:
        seen = torch.ones(max_length, max_length, dtype=torch.bool, device=query.device).tril().triu(1 - window)

    def attend(q, k, v):
        length, grouped = q.shape[2], query.shape[1] != key.shape[1]
        causal = {"is_causal": True} if window is None or length <= window else {"attn_mask": seen[:length, :length]}
        return F.scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=grouped, **causal)

    segments = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*segment) for segment in segments], dim=2).transpose(1, 2)


@cache
def _varlen_options(grouped: bool, window: int | None) -> dict:
    """How this torch release spells causal and grouped-query attention.

    2.11 has no word for the latter and does not look at the number of heads: its kernel takes fewer key heads as well.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known and window is not None:
        raise ValueError(f"varlen attention of torch {torch.__version__} has no sliding window: install torch 2.13")
    options = {"window_size": _left_right(window)} if "window_size" in known else {"is_causal": True}
    if grouped and "enable_gqa" in known:
        options["enable_gqa"] = True
    return options


def _left_right(window: int | None) -> tuple[int, int]:
    """A window as flash attention counts it: tokens before and behind."""
    return (-1 if window is None else window - 1, 0)


def _varlen(query, key, value, cu_seqlens, max_length: int, scaling: float | None, window: int | None) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    options = _varlen_options(q.shape[1] != k.shape[1], window)
    if scaling is not None:
        options = {**options, "scale": scaling}
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, **options).unsqueeze(0)


def _flash(query, key, value, cu_seqlens, max_length: int, scaling: float | None, window: int | None) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    options = {"softmax_scale": scaling, "causal": True, "window_size": _left_right(window)}
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, **options).unsqueeze(0)


_KERNELS = {"fa3": _varlen, "varlen": _varlen, "flash": _flash, "sdpa": _sdpa_per_segment}


def keep_loop_uncompiled() -> None:
    """Has torch.compile leave the loop over segments alone: it would compile it anew for each number of segments."""
    _KERNELS["sdpa"] = torch.compiler.disable(_sdpa_per_segment)


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
# The stock path under this name needs the masks that SDPA needs; the packed path builds none.
AttentionMaskInterface.register(SEGMENT_ATTENTION, sdpa_mask)
for _kernel, _name in KERNEL_NAMES.items():
    AttentionInterface.register(_name, partial(segment_attention, kernel=_kernel))
    AttentionMaskInterface.register(_name, sdpa_mask)
