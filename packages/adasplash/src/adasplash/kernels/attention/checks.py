"""What attention refuses, naming the argument, its value and what is allowed."""

import math
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number, check_tensor
from .reference import Options

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)
_MAX_DIM = 256


def check_tensors(
    shapes: tuple[torch.Size, ...],
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
) -> None:
    """Refuse what the backends cannot compute; each argument is that of q, of k and of v."""
    q, k, v = shapes
    for name, shape, dtype, device in zip("qkv", shapes, dtypes, devices, strict=True):
        if len(shape) != 4:
            raise ValueError(
                f"`{name}` must have 4 dimensions, `[batch, heads, seq, dim]`, or 3 with "
                f"`cu_seqlens_q`; got shape {tuple(shape)}."
            )
        if dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"`{name}` must be one of {allowed}; got {dtype}.")
        if dtype != dtypes[0]:
            raise TypeError(f"`{name}` must be {dtypes[0]} as `q` is; got {dtype}.")
        if device != devices[0]:
            raise ValueError(f"`{name}` must be on {devices[0]} as `q` is; got {device}.")
        if shape[0] != q[0]:
            raise ValueError(f"`{name}` must have `batch` {q[0]} as `q` does; got {shape[0]}.")
        if not 1 <= shape[3] <= _MAX_DIM:
            raise ValueError(f"`{name}` must have a last size of 1 to {_MAX_DIM}; got {shape[3]}.")
    if k[3] != q[3]:
        raise ValueError(f"`k` must have `dim_head` {q[3]} as `q` does; got {k[3]}.")
    if v[1:3] != k[1:3]:
        raise ValueError(
            f"`v` must have `heads_kv` and `seq_k` {tuple(k[1:3])} as `k` does; "
            f"got {tuple(v[1:3])}."
        )
    if k[1] == 0 or q[1] % k[1]:
        raise ValueError(
            f"`k` must have a number of heads that divides {q[1]}, the heads of `q`; got {k[1]}."
        )
    if k[2] == 0:
        raise ValueError("`k` must hold at least one key; got `seq_k` 0.")


check_once = lru_cache(1024)(check_tensors)  # what fits once fits again; shapes must be integers


def check_packed(q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
    """Refuse packed sequences that do not fit; bounds on a GPU are not looked at."""
    bounds_q, bounds_k = options.bounds_q, options.bounds_k
    if bounds_q is None:
        raise ValueError("`cu_seqlens_k` needs `cu_seqlens_q`; got None.")
    bounds_k = bounds_q if bounds_k is None else bounds_k
    check_tensor("cu_seqlens_q", bounds_q, whole=True)
    check_tensor("cu_seqlens_k", bounds_k, whole=True)
    for name, given in (("key_padding_mask", options.key_mask), ("attn_bias", options.bias)):
        if given is not None:
            raise ValueError(f"`{name}` cannot go with `cu_seqlens_q`; leave one of them out.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(
                f"`{name}` must have 3 dimensions with `cu_seqlens_q`; got shape {tuple(x.shape)}."
            )
    for name, bounds, x in (("q", bounds_q, q), ("k", bounds_k, k)):
        if bounds.ndim != 1 or len(bounds) < 2:
            raise ValueError(
                f"`cu_seqlens_{name}` must have shape (sequences + 1,); got {tuple(bounds.shape)}."
            )
        if bounds.device.type != "cpu" or torch.compiler.is_compiling():
            continue
        places = bounds.tolist()
        if places[0] != 0 or places[-1] != len(x) or places != sorted(places):
            raise ValueError(
                f"`cu_seqlens_{name}` must rise from 0 to {len(x)}, the tokens of `{name}`; "
                f"got {places}."
            )
        longest = options.max_q if name == "q" else options.max_k
        if longest and longest < max(end - start for start, end in pairwise(places)):
            raise ValueError(
                f"`max_seqlen_{name}` must be at least the longest sequence; got {longest} for "
                f"bounds {places}."
            )
    if len(bounds_q) != len(bounds_k):
        raise ValueError(
            f"`cu_seqlens_k` must hold {len(bounds_q) - 1} sequences as `cu_seqlens_q` does; "
            f"got {len(bounds_k) - 1}."
        )


def check_alpha(alpha: Any, heads: tuple[int, ...], *, softmax: bool = True) -> None:
    """Refuse an alpha that is out of range, or does not fit `batch` and `heads`.

    Values on a GPU are not looked at: that would wait for the device. No trace can either.
    """
    if not isinstance(alpha, Tensor):
        check_number("alpha", alpha)
        if not (alpha >= 1 if softmax else alpha > 1) or not alpha <= 2:
            allowed = "between 1 and 2" if softmax else "above 1, up to 2"
            raise ValueError(f"`alpha` must be {allowed}; got {alpha}.")
        return
    if tuple(alpha.shape) not in ((), heads[1:], heads):
        raise ValueError(
            f"`alpha` must have shape (), {heads[1:]} or {heads}; got {tuple(alpha.shape)}."
        )
    visible = alpha.device.type == "cpu" and not torch.compiler.is_compiling()
    if visible and not bool(((alpha > 1) & (alpha <= 2)).all()):
        raise ValueError(f"`alpha` must be above 1 and at most 2; got {alpha.tolist()}.")


def check_window(window: object) -> None:
    """Refuse what is not a pair of whole numbers."""
    if window is not None and not (
        isinstance(window, tuple | list)
        and len(window) == 2
        and all(isinstance(side, int) and side >= -1 for side in window)
    ):
        raise ValueError(
            f"`window` must be two whole numbers, at least 0, or -1 for all; got {window!r}."
        )


def check_options(q: Tensor, k: Tensor, alpha: float | Tensor, options: Options) -> None:
    """Refuse options that do not fit q and k."""
    mask, window, softcap = options.key_mask, options.window, options.softcap
    slopes, bias, scale, dropout = options.slopes, options.bias, options.scale, options.dropout
    heads = tuple(q.shape[:2])
    check_alpha(alpha, heads)
    for name, x in (("softcap", 1.0 if softcap is None else softcap), ("dropout_p", dropout)):
        check_number(name, x)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"`scale` must be finite; got {scale}.")
    if mask is not None:
        check_tensor("key_padding_mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"`key_padding_mask` must be bool, True for keys; got {mask.dtype}.")
        if mask.shape != (q.shape[0], k.shape[2]):
            raise ValueError(
                f"`key_padding_mask` must have shape {(q.shape[0], k.shape[2])}, `batch` and "
                f"`seq_k`; got {tuple(mask.shape)}."
            )
        if mask.device != q.device:
            raise ValueError(f"`key_padding_mask` must be on {q.device}; got {mask.device}.")
    check_window(window)
    if slopes is not None:
        check_tensor("alibi_slopes", slopes)
        if tuple(slopes.shape) not in (heads[1:], heads):
            raise ValueError(
                f"`alibi_slopes` must have shape {heads[1:]} or {heads}; got {tuple(slopes.shape)}."
            )
    if bias is not None:
        check_tensor("attn_bias", bias)
        if not bias.is_floating_point():
            raise TypeError(
                f"`attn_bias` must be floating point, -inf where a key is hidden; got {bias.dtype}."
            )
        shape = (*heads, q.shape[2], k.shape[2])
        sizes = zip(reversed(bias.shape), reversed(shape), strict=False)
        if bias.ndim > 4 or any(size not in (1, full) for size, full in sizes):
            raise ValueError(f"`attn_bias` must broadcast to {shape}; got {tuple(bias.shape)}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"`softcap` must be positive and finite; got {softcap}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout_p` must be at least 0 and below 1; got {dropout}.")
