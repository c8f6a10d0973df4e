"""The accept scan and the next token: two launches when greedy, four or five when sampling.

    line     of each slice of p's logits: peak and sum of exponentials, or the best token
    scan     ours = p(x), theirs = q(x); accepted tokens, or each prefix's share of a block
    excess   sum max(share p - q, 0) after each prefix of a block
    follow   of each slice: best of log max(share p - q, 0) + gumbel, and of log p + gumbel
    settled  the next token

See `kernel` for the rest, and `reference.judge`.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernel import BLOCK, _better, _first_of, _left, _log_exponential, _uniform, slices_of
from .noise import COINS, FOLLOWING
from .reference import CERTAIN, Cut, Law

_COINS, _FOLLOWING = tl.constexpr(COINS), tl.constexpr(FOLLOWING)
_NEVER = tl.constexpr(2147483647)


@triton.jit
@no_type_check
def _psi(
    token,
    place,
    inside,
    law_ptr,
    norms_ptr,
    of_ptr,
    row,
    law_row,
    law_step,
    norms_row,
    KIND: tl.constexpr,
):
    """Return the law of a proposal at tokens; for `KIND` 0 the tokens are the proposals."""
    if KIND == 0:
        return tl.where(inside, 1.0, 0.0)
    norm = tl.load(norms_ptr + row * norms_row + place)
    line = law_ptr + row.to(tl.int64) * law_row + place.to(tl.int64) * law_step
    if KIND == 1:
        column = tl.load(of_ptr + token, mask=inside, other=-1)
        inside = inside & (column >= 0)
        return tl.exp(tl.load(line + column, mask=inside, other=float("-inf")) - norm)
    return tl.load(line + token, mask=inside, other=0.0) / norm


@triton.jit
@no_type_check
def _line_kernel(
    logits_ptr,
    state_ptr,
    part_ptr,
    place_ptr,
    value_ptr,
    first_ptr,
    vocab,
    temperature,
    DRAWS: tl.constexpr,
    CUT: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Look through one slice of one line of logits; the round's number goes up."""
    line, piece = tl.program_id(0), tl.program_id(1)
    if DRAWS:  # noqa: SIM102 - known when compiling, the next is not
        if line + piece == 0:
            tl.store(state_ptr + 1, tl.load(state_ptr + 1) + 1)
    length = tl.cdiv(tl.cdiv(vocab, SLICES), BLOCK) * BLOCK
    lane = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    where = lane * 0
    mass = tl.zeros([BLOCK], tl.float32)
    broken = lane * 0
    for at in range(piece * length, tl.minimum(piece * length + length, vocab), BLOCK):
        token = at + lane
        inside = token < vocab
        z = tl.load(
            logits_ptr + line.to(tl.int64) * vocab + token, mask=inside, other=float("-inf")
        ).to(tl.float32)
        broken = broken | (z != z).to(tl.int32)
        z = _left(z, token, value_ptr, first_ptr, line, CUT)
        if DRAWS:
            z = z / temperature
            higher = tl.maximum(peak, z)
            known = tl.where(higher == float("-inf"), 0.0, higher)
            mass = mass * tl.exp(peak - known) + tl.exp(z - known)
            peak = higher
        else:
            peak, where = _better(z, token, peak, where)
    part = part_ptr + (line * SLICES + piece) * 3
    top = tl.max(peak, axis=0)
    tl.store(part, top)
    tl.store(part + 2, tl.max(broken, axis=0).to(tl.float32))
    if DRAWS:
        known = tl.where(top == float("-inf"), 0.0, top)
        tl.store(part + 1, tl.sum(mass * tl.exp(peak - known), axis=0))
    else:
        tl.store(place_ptr + line * SLICES + piece, _first_of(peak, where))


@triton.jit
@no_type_check
def _scan_kernel(
    logits_ptr,
    part_ptr,
    place_ptr,
    tokens_ptr,
    limits_ptr,
    law_ptr,
    norms_ptr,
    of_ptr,
    state_ptr,
    logsum_ptr,
    share_ptr,
    value_ptr,
    first_ptr,
    accepted_ptr,
    following_ptr,
    tokens_stride,
    limits_stride,
    result_stride,
    law_row,
    law_step,
    norms_row,
    vocab,
    count,
    temperature,
    DRAWS: tl.constexpr,
    CUT: tl.constexpr,
    BLOCKWISE: tl.constexpr,
    KIND: tl.constexpr,
    PLACES: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Join the slices of one row's lines, and scan its proposals."""
    row = tl.program_id(0)
    place, piece = tl.arange(0, PLACES), tl.arange(0, SLICES)
    line = row * (count + 1) + tl.minimum(place, count)
    part = (line[:, None] * SLICES + piece[None, :]) * 3
    limit = tl.minimum(tl.load(limits_ptr + row * limits_stride), count)
    real = place < limit
    token = tl.load(tokens_ptr + row * tokens_stride + place, mask=real, other=0)
    peak = tl.load(part_ptr + part)
    top = tl.max(peak, axis=1)
    broken = tl.max(tl.max(tl.load(part_ptr + part + 2), axis=1), axis=0) > 0
    if DRAWS:
        known = tl.where(top == float("-inf"), 0.0, top)
        mass = tl.sum(tl.load(part_ptr + part + 1) * tl.exp(peak - known[:, None]), axis=1)
        logsum = top + tl.log(mass)
        tl.store(logsum_ptr + line, logsum, mask=place <= count)
        z = tl.load(logits_ptr + line.to(tl.int64) * vocab + token).to(tl.float32)
        z = _left(z, token, value_ptr, first_ptr, line, CUT) / temperature
        ours = tl.where(real, tl.exp(z - logsum), 0.0)
        there = tl.maximum(tl.minimum(place, count - 1), 0)
        theirs = _psi(
            token, there, real, law_ptr, norms_ptr, of_ptr, row, law_row, law_step, norms_row, KIND
        )
        share = tl.full([PLACES], 1.0, tl.float32)
        if BLOCKWISE:
            ratio = ours / tl.where(real, theirs, 1.0)
            so_far = 1.0
            for i in range(0, count):
                so_far = tl.minimum(so_far * tl.sum(tl.where(place == i, ratio, 0.0)), 1.0)
                share = tl.where(place == i + 1, so_far, share)
        coin = _uniform(state_ptr, place, _COINS, row)
        fits = real & (coin * theirs < ours)
        tl.store(share_ptr + line, share, mask=place <= count)
    else:
        first = tl.load(place_ptr + line[:, None] * SLICES + piece[None, :])
        choice = tl.min(tl.where(peak == top[:, None], first, _NEVER), axis=1)
        fits = real & (choice == token)
    accepted = tl.min(tl.where(fits, _NEVER, place), axis=0)
    if not DRAWS:
        following = tl.sum(tl.where(place == accepted, choice, 0), axis=0)
        tl.store(following_ptr + row * result_stride, following.to(tl.int64))
    tl.store(accepted_ptr + row * result_stride, tl.where(broken, -1, accepted).to(tl.int64))


@triton.jit
@no_type_check
def _excess_kernel(
    logits_ptr,
    limits_ptr,
    law_ptr,
    norms_ptr,
    of_ptr,
    logsum_ptr,
    share_ptr,
    value_ptr,
    first_ptr,
    excess_ptr,
    limits_stride,
    law_row,
    law_step,
    norms_row,
    vocab,
    count,
    temperature,
    KIND: tl.constexpr,
    CUT: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum one slice of max(share p − q, 0) after one prefix of a block."""
    row, place, piece = tl.program_id(0) // count, tl.program_id(0) % count, tl.program_id(1)
    line = row * (count + 1) + place
    limit = tl.minimum(tl.load(limits_ptr + row * limits_stride), count)
    if (place > 0) & (place < limit):
        length = tl.cdiv(tl.cdiv(vocab, SLICES), BLOCK) * BLOCK
        lane = tl.arange(0, BLOCK)
        share, logsum = tl.load(share_ptr + line), tl.load(logsum_ptr + line)
        total = tl.zeros([BLOCK], tl.float32)
        for at in range(piece * length, tl.minimum(piece * length + length, vocab), BLOCK):
            token = at + lane
            inside = token < vocab
            z = tl.load(
                logits_ptr + line.to(tl.int64) * vocab + token, mask=inside, other=float("-inf")
            ).to(tl.float32)
            z = _left(z, token, value_ptr, first_ptr, line, CUT) / temperature
            theirs = _psi(
                token,
                place,
                inside,
                law_ptr,
                norms_ptr,
                of_ptr,
                row,
                law_row,
                law_step,
                norms_row,
                KIND,
            )
            total += tl.maximum(share * tl.exp(z - logsum) - theirs, 0.0)
        tl.store(excess_ptr + line * SLICES + piece, tl.sum(total, axis=0))


@triton.jit
@no_type_check
def _accepted(
    accepted_ptr,
    limits_ptr,
    share_ptr,
    excess_ptr,
    state_ptr,
    row,
    limits_stride,
    result_stride,
    count,
    BLOCKWISE: tl.constexpr,
    PLACES: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Return how many proposals a row keeps: the scan's, or the longest prefix of a block."""
    found = tl.load(accepted_ptr + row * result_stride).to(tl.int32)
    if BLOCKWISE:
        limit = tl.minimum(tl.load(limits_ptr + row * limits_stride), count).to(tl.int32)
        place, piece = tl.arange(0, PLACES), tl.arange(0, SLICES)
        inner = place + 1 < limit  # Prefixes of place + 1 tokens that are not the whole block.
        line = row * (count + 1) + tl.minimum(place + 1, count)
        rest = tl.sum(
            tl.load(
                excess_ptr + line[:, None] * SLICES + piece[None, :],
                mask=inner[:, None],
                other=0.0,
            ),
            axis=1,
        )
        share = tl.load(share_ptr + line)
        some = tl.where(rest > 0, rest, 1.0)
        keep = tl.where(rest > 0, some / (some + 1.0 - share), tl.where(share >= 1, 1.0, 0.0))
        bound = tl.where(inner, keep, share)
        coin = _uniform(state_ptr, place, _COINS, row)
        length = tl.max(tl.where((coin < bound) & (place < limit), place + 1, 0), axis=0)
        found = tl.where(found < 0, found, length)
    return found


@triton.jit
@no_type_check
def _follow_kernel(
    logits_ptr,
    tokens_ptr,
    limits_ptr,
    law_ptr,
    norms_ptr,
    of_ptr,
    state_ptr,
    logsum_ptr,
    share_ptr,
    value_ptr,
    first_ptr,
    excess_ptr,
    accepted_ptr,
    part_ptr,
    place_ptr,
    tokens_stride,
    limits_stride,
    result_stride,
    law_row,
    law_step,
    norms_row,
    vocab,
    count,
    temperature,
    BLOCKWISE: tl.constexpr,
    KIND: tl.constexpr,
    CUT: tl.constexpr,
    PLACES: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the best token of one slice for one row, of the residual law and of p."""
    row, piece = tl.program_id(0), tl.program_id(1)
    found = _accepted(
        accepted_ptr,
        limits_ptr,
        share_ptr,
        excess_ptr,
        state_ptr,
        row,
        limits_stride,
        result_stride,
        count,
        BLOCKWISE,
        PLACES,
        SLICES,
    )
    place = tl.maximum(found, 0)
    line = row * (count + 1) + place
    refused = place < tl.minimum(tl.load(limits_ptr + row * limits_stride), count)
    share, logsum = tl.load(share_ptr + line), tl.load(logsum_ptr + line)
    proposal = tl.load(tokens_ptr + row * tokens_stride + place, mask=refused, other=-1)
    length = tl.cdiv(tl.cdiv(vocab, SLICES), BLOCK) * BLOCK
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    spare = best
    where, spare_where = lane * 0, lane * 0
    for at in range(piece * length, tl.minimum(piece * length + length, vocab), BLOCK):
        token = at + lane
        inside = token < vocab
        z = tl.load(
            logits_ptr + line.to(tl.int64) * vocab + token, mask=inside, other=float("-inf")
        ).to(tl.float32)
        z = _left(z, token, value_ptr, first_ptr, line, CUT) / temperature - logsum
        noise = _log_exponential(state_ptr, token, _FOLLOWING, row)
        spare, spare_where = _better(z - noise, token, spare, spare_where)
        if refused:
            at_proposal = inside
            if KIND == 0:
                at_proposal = token == proposal
            theirs = _psi(
                token,
                place,
                at_proposal,
                law_ptr,
                norms_ptr,
                of_ptr,
                row,
                law_row,
                law_step,
                norms_row,
                KIND,
            )
            left = share * tl.exp(z) - theirs
            some = left > 0
            value = tl.where(some, tl.log(tl.where(some, left, 1.0)) - noise, float("-inf"))
            best, where = _better(value, token, best, where)
    part = (row * SLICES + piece) * 2
    tl.store(part_ptr + part, tl.max(best, axis=0))
    tl.store(part_ptr + part + 1, tl.max(spare, axis=0))
    tl.store(place_ptr + part, _first_of(best, where))
    tl.store(place_ptr + part + 1, _first_of(spare, spare_where))


@triton.jit
@no_type_check
def _settled_kernel(
    limits_ptr,
    state_ptr,
    share_ptr,
    excess_ptr,
    accepted_ptr,
    following_ptr,
    part_ptr,
    place_ptr,
    limits_stride,
    result_stride,
    count,
    BLOCKWISE: tl.constexpr,
    PLACES: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Join the slices of one row."""
    row = tl.program_id(0)
    found = _accepted(
        accepted_ptr,
        limits_ptr,
        share_ptr,
        excess_ptr,
        state_ptr,
        row,
        limits_stride,
        result_stride,
        count,
        BLOCKWISE,
        PLACES,
        SLICES,
    )
    piece = tl.arange(0, SLICES)
    part = (row * SLICES + piece) * 2
    best, spare = tl.load(part_ptr + part), tl.load(part_ptr + part + 1)
    following = _first_of(best, tl.load(place_ptr + part))
    otherwise = _first_of(spare, tl.load(place_ptr + part + 1))
    # Rounding may leave nothing where p and q agree: then p itself is the right law.
    some = tl.max(best, axis=0) > float("-inf")
    tl.store(accepted_ptr + row * result_stride, found.to(tl.int64))
    tl.store(following_ptr + row * result_stride, tl.where(some, following, otherwise).to(tl.int64))


def launch_judge(
    logits: Tensor,
    tokens: Tensor,
    limits: Tensor,
    law: Law,
    accepted: Tensor,
    following: Tensor,
    draws: tuple[Tensor, float] | None = None,
    block: bool = False,
    left: Cut | None = None,
) -> None:
    """See `reference.judge`."""
    rows, count = tokens.shape
    lines, vocab = logits.shape
    device, slices = logits.device, slices_of(vocab)

    def number(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    part = number(lines, slices, 3)
    place = torch.empty(lines, slices, dtype=torch.int32, device=device)
    places = triton.next_power_of_2(max(count + 1, 2))
    state, temperature = draws or (limits, 1.0)
    weights, norms, of = law.weights, law.norms, law.column_of
    law_strides = weights.stride(0), weights.stride(1), norms.stride(0)
    strides = tokens.stride(0), limits.stride(0), accepted.stride(0)
    drawn = rows * (count + 1) if draws is not None else 1
    logsum, share, excess = number(drawn), number(drawn), number(drawn, slices)
    assert logits.stride(0) == vocab
    assert following.stride(0) == accepted.stride(0)
    kind, cut, cuts = law.kind, left or (part, place), left is not None and draws is not None
    block = block and kind != CERTAIN
    _line_kernel[(lines, slices)](
        logits,
        state,
        part,
        place,
        *cut,
        vocab,
        float(temperature),
        DRAWS=draws is not None,
        CUT=cuts,
        SLICES=slices,
        BLOCK=BLOCK,
        num_warps=4,
    )
    _scan_kernel[(rows,)](
        logits,
        part,
        place,
        tokens,
        limits,
        weights,
        norms,
        of,
        state,
        logsum,
        share,
        *cut,
        accepted,
        following,
        *strides,
        *law_strides,
        vocab,
        count,
        float(temperature),
        DRAWS=draws is not None,
        CUT=cuts,
        BLOCKWISE=block,
        KIND=kind,
        PLACES=places,
        SLICES=slices,
        num_warps=4,
    )
    if draws is None:
        return
    if block and count > 1:
        _excess_kernel[(rows * count, slices)](
            logits,
            limits,
            weights,
            norms,
            of,
            logsum,
            share,
            *cut,
            excess,
            limits.stride(0),
            *law_strides,
            vocab,
            count,
            float(temperature),
            KIND=kind,
            CUT=cuts,
            SLICES=slices,
            BLOCK=BLOCK,
            num_warps=4,
        )
    best = number(rows, slices, 2)
    best_place = torch.empty(rows, slices, 2, dtype=torch.int32, device=device)
    _follow_kernel[(rows, slices)](
        logits,
        tokens,
        limits,
        weights,
        norms,
        of,
        state,
        logsum,
        share,
        *cut,
        excess,
        accepted,
        best,
        best_place,
        *strides,
        *law_strides,
        vocab,
        count,
        float(temperature),
        BLOCKWISE=block,
        KIND=kind,
        CUT=cuts,
        PLACES=places,
        SLICES=slices,
        BLOCK=BLOCK,
        num_warps=4,
    )
    _settled_kernel[(rows,)](
        limits,
        state,
        share,
        excess,
        accepted,
        following,
        best,
        best_place,
        *strides[1:],
        count,
        BLOCKWISE=block,
        PLACES=places,
        SLICES=slices,
        num_warps=1,
    )
