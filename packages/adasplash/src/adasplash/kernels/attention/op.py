"""The public function: what its options mean, and the choice of the backend."""

import logging
from functools import cache
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fourfold_common import triton_status

from ..checks import check_number, check_tensor
from . import reference
from .checks import (
    KERNEL_DTYPES,
    check_once,
    check_options,
    check_packed,
    check_tensors,
)
from .diagnostics import AttentionAux, attention_aux
from .dropout import fresh_seed
from .operators import attend, unheard
from .terms import Terms

_logger = logging.getLogger(__name__)
_status_of_gpus = cache(triton_status)  # whether kernels are interpreted matters on a CPU alone
# Asked once: torch.compile cannot trace the question in torch 2.11.
_AUTOCAST = [
    kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)
]


@overload
def adasplash(
    q: Tensor, k: Tensor, v: Tensor, alpha: float | Tensor = ..., is_causal: bool = ...,
    varlen: Tensor | None = ..., niter: int | None = ..., *, scale: float | None = ...,
    window: tuple[int, int] | None = ..., alibi_slopes: Tensor | None = ...,
    attn_bias: Tensor | None = ..., softcap: float | None = ..., dropout_p: float = ...,
    key_padding_mask: Tensor | None = ..., cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ..., max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., return_aux: Literal[False] = ...,
    backend: Literal["auto", "triton", "reference"] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def adasplash(
    q: Tensor, k: Tensor, v: Tensor, alpha: float | Tensor = ..., is_causal: bool = ...,
    varlen: Tensor | None = ..., niter: int | None = ..., *, scale: float | None = ...,
    window: tuple[int, int] | None = ..., alibi_slopes: Tensor | None = ...,
    attn_bias: Tensor | None = ..., softcap: float | None = ..., dropout_p: float = ...,
    key_padding_mask: Tensor | None = ..., cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ..., max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ..., return_aux: Literal[True],
    backend: Literal["auto", "triton", "reference"] = ...,
) -> tuple[Tensor, AttentionAux]: ...  # fmt: skip


def adasplash(
    q: Float[Tensor, "batch heads seq_q dim_head"] | Float[Tensor, "tokens_q heads dim_head"],
    k: Float[Tensor, "batch heads_kv seq_k dim_head"] | Float[Tensor, "tokens_k heads_kv dim_head"],
    v: Float[Tensor, "batch heads_kv seq_k dim_value"]
    | Float[Tensor, "tokens_k heads_kv dim_value"],
    alpha: float | Tensor = 1.5,
    is_causal: bool = True,
    varlen: Int[Tensor, " batch"] | None = None,
    niter: int | None = None,
    *,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Float[Tensor, "... heads"] | None = None,
    attn_bias: Float[Tensor, "..."] | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Bool[Tensor, "batch seq_k"] | None = None,
    cu_seqlens_q: Int[Tensor, " bounds"] | None = None,
    cu_seqlens_k: Int[Tensor, " bounds"] | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_aux: bool = False,
    backend: Literal["auto", "triton", "reference"] = "auto",
) -> (
    Float[Tensor, "batch heads seq_q dim_value"]
    | Float[Tensor, "tokens_q heads dim_value"]
    | tuple[
        Float[Tensor, "batch heads seq_q dim_value"] | Float[Tensor, "tokens_q heads dim_value"],
        AttentionAux,
    ]
):
    """Return attention whose weights are the alpha-entmax of the scores, most of them exactly zero.

    The weights of row i are `p = relu((alpha - 1) s - tau_i) ** (1 / (alpha - 1))`, where `s` are
    the scores, `scale * q_i k^T` with what the options add, and `tau_i` makes them sum to 1.
    Differentiable in q, k, v, `alpha`, `alibi_slopes` and `attn_bias`; deterministic, dropout
    under `torch.manual_seed`. A row without a visible key gives zeros and zero gradients; a NaN
    stays in the rows that see it. Under autocast q, k and v are cast to its dtype, as in torch's
    own attention.

    The kernels compute every `alpha` above 1 with every option, and are fastest at 1.5; `alpha` 1
    is torch's softmax attention, or the reference where that lacks an option.

    Which weights are dropped follows from a seed that is drawn on the device, once for every call
    and the same for both backends. Checkpointing draws it again from the generator's state that it
    keeps; every replay of a CUDA graph draws another one.

    Args:
        q: Queries, float16, bfloat16, float32 or (reference only) float64. Any strides. With
            `cu_seqlens` the sequences stand one after another, `[tokens_q, heads, dim_head]`.
        k: Keys, dtype and device of `q`; `heads` is a multiple of `heads_kv`.
        v: Values, dtype and device of `q`; `dim_value` may differ from `dim_head`.
        alpha: 1 (softmax) to 2 (sparsemax); or a tensor of shape `[]`, `[heads]` or
            `[batch, heads]` with values above 1, up to 2.
        is_causal: Row i sees keys up to `i + seq_k - seq_q` (aligned at the last).
        varlen: Length of every sequence, where padding follows it; rows of padding give zeros. On
            a GPU a length above that of `k` counts as that: looking would wait for the device.
        niter: Has no effect: thresholds are always solved to rounding. It stands where the paper's
            own package has it.
        scale: Factor of the scores; `dim_head ** -0.5` if None.
        window: How many keys to the left and right of its own position a row sees; -1 for all.
        alibi_slopes: The distance to a key times the slope of the head is taken off the score;
            `[heads]` or `[batch, heads]`.
        attn_bias: Added to the scores; broadcasts to `[batch, heads, seq_q, seq_k]`. -inf and the
            smallest number of its dtype hide a key.
        softcap: Products become `softcap * tanh(s / softcap)` before anything is added.
        dropout_p: Probability with which a weight is dropped and the others are scaled up.
        key_padding_mask: True for keys to attend to; holes are allowed.
        cu_seqlens_q: Where the packed sequences begin, and where the last one ends.
        cu_seqlens_k: The same for keys; that of the queries if None. On a GPU the kernels do not
            look at the values of either, which would wait for the device: they must rise from 0 and
            not pass the tokens; rows behind the last one give zeros.
        max_seqlen_q: Length of the longest sequence with `cu_seqlens_q`, or more. If None it is
            read from the bounds, which waits for their device; a trace or the capture of a CUDA
            graph makes room for one sequence of all tokens instead.
        max_seqlen_k: The same for keys.
        return_aux: Also return thresholds, sizes of the support and the share of blocks that hold
            weight. A diagnostic: plain PyTorch on every device, one more pass over all scores.
        backend: `"triton"` runs the kernels, `"reference"` plain PyTorch; `"auto"` the kernels for
            CUDA tensors when Triton can be imported and `alpha` is not 1, else the reference. A
            backend that was asked for is never replaced by the other.

    Returns:
        The output, in the dtype of `q`, and an `AttentionAux` if asked for.

    Raises:
        TypeError: A dtype is not supported, or dtypes differ.
        ValueError: Shapes, devices or an option do not fit, or the backend cannot run here.

    Source: AdaSplash (arXiv 2502.12082), equations 5 to 9.
    """
    if return_aux and not isinstance(alpha, Tensor) and alpha == 1:
        raise ValueError(
            f"`return_aux` needs an `alpha` above 1, softmax has no threshold; got {alpha}."
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    if not isinstance(is_causal, bool | int | torch.SymBool):
        raise TypeError(f"`is_causal` must be True or False; got {is_causal!r}.")
    if scale is not None:
        check_number("scale", scale, tensor=True)
    options = reference.Options(
        scale=max(1, q.shape[-1]) ** -0.5 if scale is None else float(scale), is_causal=is_causal,
        key_mask=key_padding_mask, window=window, softcap=softcap, slopes=alibi_slopes,
        bias=attn_bias, dropout=dropout_p, bounds_q=cu_seqlens_q, bounds_k=cu_seqlens_k,
        max_q=max_seqlen_q or 0, max_k=max_seqlen_k or 0,
    )  # fmt: skip
    row_mask = None
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        if varlen is not None:
            raise ValueError("`varlen` cannot go with `cu_seqlens_q`; leave one of them out.")
        check_packed(q, k, v, options)
        max_q = options.max_q or _longest(cu_seqlens_q)
        if cu_seqlens_k is None:
            cu_seqlens_k, max_k = cu_seqlens_q, options.max_k or max_q
        else:
            max_k = options.max_k or _longest(cu_seqlens_k)
        options = options._replace(bounds_k=cu_seqlens_k, max_q=max_q, max_k=max_k)
        if len(k) == 0:  # no key to see
            output = q.new_zeros(*q.shape[:2], v.shape[2]) + 0 * (q.sum() + k.sum() + v.sum())
        else:
            its_q, its_k, its_v = (x.transpose(0, 1)[None] for x in (q, k, v))
            output = _attend(its_q, its_k, its_v, alpha, options, backend)[0].transpose(0, 1)
    elif max_seqlen_q is not None or max_seqlen_k is not None:
        raise ValueError("`max_seqlen_q` and `max_seqlen_k` need `cu_seqlens_q`; got None.")
    elif varlen is not None:
        options = options._replace(key_mask=_shown(q, k, varlen, key_padding_mask))
        row_mask = _within(q, varlen)
        output = _attend(q, k, v, alpha, options, backend)
        output = output.masked_fill(~row_mask[:, None, :, None], 0.0)
    else:
        output = _attend(q, k, v, alpha, options, backend)
    if not return_aux:
        return output
    return output, attention_aux(_as_autocast(q), _as_autocast(k), alpha, options, row_mask)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor,
    options: reference.Options,
    backend: str,
) -> Tensor:
    """Return the attention of tensors of 4 dimensions, also where they hold packed sequences."""
    q, k, v = _as_autocast(q), _as_autocast(k), _as_autocast(v)
    direct = unheard(q, k, v)
    (check_once if direct else check_tensors)(
        (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device)
    )
    check_options(q, k, alpha, options)
    softmax = isinstance(alpha, float | int) and alpha == 1
    chosen = _choose(backend, q, softmax)
    if q.numel() == 0:
        # No rows: an empty output that still belongs to the graph.
        return q.new_zeros(*q.shape[:-1], v.shape[-1]) + 0 * (q.sum() + k.sum() + v.sum())
    # torch aligns the causal mask at the first, and gives NaN for rows without a key.
    simple = not options.is_causal or q.shape[2] == k.shape[2]
    if softmax and options.plain and simple and options.bounds_q is None and backend == "auto":
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=options.is_causal, scale=options.scale, dropout_p=options.dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    if options.dropout > 0.0 and options.seed is None:
        options = options._replace(seed=fresh_seed(q.device))
    if chosen == "triton":
        return _launch(q, k, v, alpha, options, direct)
    if options.bounds_q is not None:
        return _one_by_one(q, k, v, alpha, options, backend)
    return reference.attention(
        q, k, v, alpha if isinstance(alpha, Tensor) else float(alpha), options
    )


def _as_autocast(x: Tensor) -> Tensor:
    """Return a tensor in the dtype of autocast, where that is on."""
    kind = x.device.type
    if kind in _AUTOCAST and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor,
    options: reference.Options,
    backend: str,
) -> Tensor:
    """Return the attention of packed sequences, one after another."""
    outputs = []
    for rows, keys in reference.sequences(options):
        one = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        if rows.start == rows.stop or keys.start == keys.stop:  # no rows, or no key to see
            outputs.append(one[0].new_zeros(*one[0].shape[:3], v.shape[3]))
            continue
        its = options._replace(bounds_q=None, bounds_k=None, first_row=rows.start)
        outputs.append(_attend(*one, alpha, its, backend))
    return torch.cat(outputs, 2)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor,
    options: reference.Options,
    direct: bool,
) -> Tensor:
    """Return the output of the kernels, for arguments that have been checked."""
    factor, window, bias = options.scale, options.window, options.bias
    if factor < 0.0:  # the kernels take the maximum before they scale
        q, factor = -q, -factor
    mask = None if options.key_mask is None else options.key_mask.contiguous()
    alphas: Tensor | None
    if isinstance(alpha, Tensor):
        alphas = _per_head(alpha, q)
    else:
        alphas = None if alpha == 1.5 else torch.full(q.shape[:2], alpha, device=q.device)
    if bias is not None:
        bias = bias.to(q.device)[(None,) * (4 - bias.ndim)]
        bias = bias.float() if bias.dtype == torch.float64 else bias
    terms = Terms(
        slopes=None if options.slopes is None else _per_head(options.slopes, q),
        bias=bias,
        seed=options.seed,
        bounds_q=_bounds(options.bounds_q, q),
        bounds_k=_bounds(options.bounds_k, q),
        softcap=options.softcap or 0.0,
        dropout=options.dropout,
        max_q=options.max_q,
        max_k=options.max_k,
    )
    group = q.shape[1] // k.shape[1]
    single = q.shape[2] == 1 and group > 1 and window is None and terms.bare
    if single and not isinstance(alpha, Tensor):
        # One query sees all keys: the heads that share them become the rows of one tile.
        rows = q.reshape(q.shape[0], k.shape[1], group, q.shape[3])
        alphas = None if alphas is None else alphas[:, ::group].contiguous()
        folded = attend(rows, k, v, mask, alphas, (factor, False, -1, -1), terms, direct=direct)
        return folded.reshape(*q.shape[:3], v.shape[3])
    # -1 stands for no window in the operator; one open side sees as far as there are keys.
    far = q.shape[2] + k.shape[2]
    left, right = (-1, -1) if window is None else (far if side < 0 else side for side in window)
    return attend(
        q, k, v, mask, alphas, (factor, options.is_causal, left, right), terms, direct=direct
    )


def _longest(bounds: Tensor | None) -> int:
    """Return the length of the longest packed sequence; 0 where bounds cannot be looked at."""
    if bounds is None or bounds.is_meta or torch.compiler.is_compiling():
        return 0
    if bounds.is_cuda and torch.cuda.is_current_stream_capturing():
        return 0
    return int(bounds.diff().max())


def _per_head(x: Tensor, q: Tensor) -> Tensor:
    """Return numbers of heads as the kernels read them, float32 `[batch, heads]`."""
    return x.to(q.device, torch.float32).expand(q.shape[:2]).contiguous()


def _bounds(x: Tensor | None, q: Tensor) -> Tensor | None:
    return None if x is None else x.to(q.device, torch.int32).contiguous()


@overload
def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor = ...,
    *,
    is_causal: bool = ...,
    return_aux: Literal[False] = ...,
    **options: Any,
) -> Tensor: ...


@overload
def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor = ...,
    *,
    is_causal: bool = ...,
    return_aux: Literal[True],
    **options: Any,
) -> tuple[Tensor, AttentionAux]: ...


def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float | Tensor = 1.5,
    *,
    is_causal: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, AttentionAux]:
    """Return `adasplash(q, k, v, ...)`, not causal unless asked, as torch's own attention is.

    Args:
        q: As for `adasplash`.
        k: As for `adasplash`.
        v: As for `adasplash`.
        alpha: As for `adasplash`.
        is_causal: Whether a row sees no later keys.
        options: Other options of `adasplash`, by name.
    """
    found: Tensor | tuple[Tensor, AttentionAux] = adasplash(q, k, v, alpha, is_causal, **options)
    return found


def _within(x: Tensor, lengths: Tensor) -> Tensor:
    """Return which places come before the end of their sequence, `[batch, seq]`."""
    return torch.arange(x.shape[2], device=x.device) < lengths.to(x.device)[:, None]


def _shown(q: Tensor, k: Tensor, lengths: Tensor, mask: Tensor | None) -> Tensor:
    """Return the key padding mask of sequences of some lengths."""
    check_tensor("varlen", lengths, whole=True)
    if q.ndim != 4 or k.ndim != 4 or q.shape[2] != k.shape[2]:
        raise ValueError(
            "`varlen` needs as many queries as keys, `[batch, heads, seq, dim_head]`; got "
            f"{tuple(q.shape)} and {tuple(k.shape)}."
        )
    if lengths.shape != (q.shape[0],):
        raise ValueError(
            f"`varlen` must have shape {(q.shape[0],)}, a length for each sequence; got "
            f"{tuple(lengths.shape)}."
        )
    # Values on a GPU are not looked at: that would wait for the device. No trace can either.
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        values = lengths.tolist()
        if not all(0 <= length <= k.shape[2] for length in values):
            raise ValueError(
                f"`varlen` must hold lengths from 0 to {k.shape[2]}, those of `k`; got {values}."
            )
    if mask is not None:
        raise ValueError("`key_padding_mask` cannot go with `varlen`; leave one of them out.")
    return _within(k, lengths)


def _choose(backend: str, q: Tensor, softmax: bool) -> str:
    """Return the backend to run; raise if the one asked for cannot."""
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"`backend` must be 'auto', 'triton' or 'reference'; got {backend!r}.")
    if backend == "reference" or (backend == "auto" and not q.is_cuda):
        return "reference"
    compiling = torch.compiler.is_compiling()  # it comes with Triton, and traces no imports
    status = None if compiling else _status_of_gpus() if q.is_cuda else triton_status()
    problem = ""
    if status is not None and not status.importable:
        problem = f"Triton cannot be imported ({status.reason})"
    elif status is not None and not q.is_cuda and not status.interpreting:
        problem = f"Triton needs CUDA tensors, or TRITON_INTERPRET=1; `q` is on {q.device}"
    elif q.dtype not in KERNEL_DTYPES:
        problem = f"the kernels do not compute {q.dtype}"
    elif softmax:
        problem = "the kernels compute no softmax, `alpha` 1"
    if not problem:
        return "triton"
    if backend == "triton":
        raise ValueError(f"`backend` 'triton' cannot run here: {problem}; use 'reference'.")
    if not compiling:
        _logger.debug("using the reference: %s", problem)
    return "reference"
