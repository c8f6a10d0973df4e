"""Steps towards the threshold tau, from sums over one pass of the scores.

With A0, A1, A2 the sums of x^2, x and 1 over `x = relu(z - t)`, f(t) = A0 - 1 is decreasing and
convex, so each pass over the scores yields certified bounds of tau: Newton's step is a lower bound
(B1), the root for the support of t bounds tau from above where f > 0 and from below where f < 0
(B2). The step in between is weighted by how far the row is from both.

For another alpha `p = x ** (1 / (alpha - 1))`. The norm of x to that power is convex in t as well,
and Newton's step on it a lower bound; it alone is taken, from the left.

Half formats need no certificate of the last digit, as their weights are divided by their sum in the
end: there `approach` does without A2. What matters is the row of a tile that is worst guessed: with
the sums at one t it makes nearly every tile go twice over its blocks, with those at two t of one
pass hardly any. Newton's bound keeps it safe.

Source: AdaSplash (arXiv 2502.12082), section 3.1; bounds, stopping rule and the powers are our own.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

MAX_PASSES = 20  # this bounds the loop where ties slow it down
# On the sum of a row: a few units in the last place of one, or far below the step of half formats.
TOLERANCE = {torch.float32: 2e-7, torch.float16: 1e-5, torch.bfloat16: 1e-4}


# Half formats: how far the sum of the weights of a row may be from 1 before they are divided by it.
# Of that a quarter stays in weights that are evenly spread; most rows are ten times as near.
SLACK = {torch.float16: 4 * 2.0**-10, torch.bfloat16: 4 * 2.0**-7}
# Half formats: how far from 1 the nearer of two sums may be where tau lies outside of the two t.
NEAR = {torch.float16: 0.05, torch.bfloat16: 0.4}
# Half formats, other alphas: from how far above 1 a step is the last, without a look at where it
# ends. In long rows that was within 5e-5 and 4e-4 of 1: nearer than what a look takes for good.
TRUST = {torch.float16: 0.005, torch.bfloat16: 0.02}


def hand_over(dtype: torch.dtype) -> float:
    """Return from how far away of 1 a step of `approach` from one t ends within `SLACK`, mostly."""
    return float((5 * SLACK[dtype]) ** 0.5)


@triton.jit
@no_type_check
def newton(t, a0, goal, a1, power, HALF: tl.constexpr):
    """Return Newton's step for a0 = goal: left of the root, if t is; `a1` is not 0.

    For other alphas it is taken on the p-norm of x, whose slope is -a1 / a0^(1 - 1 / power).
    """
    if HALF:
        return t + 0.5 * (a0 - goal) / tl.where(a1 > 0.0, a1, 1.0)
    else:
        norm = tl.exp2(tl.log2(tl.where(a0 > 0.0, a0, 1.0)) * (1.0 - 1.0 / power))
        return t + (a0 - tl.exp2(tl.log2(goal) / power) * norm) / tl.where(a1 > 0.0, a1, 1.0)


@triton.jit
@no_type_check
def step_left(t, a0, goal, a1, a2, power, HALF: tl.constexpr):
    """Return a step that lands left of the root of a0 - goal, a lower and an upper bound of it.

    HALF: with g = a2 f / a1^2, the weight that keeps the step left of the root for evenly spread
    scores is g / 2. Where the support of t has no root (g > 1), Halley's step is taken, and the
    upper bound is infinite.
    """
    below = newton(t, a0, goal, a1, power, HALF)
    if HALF:
        f = a0 - goal
        slope = tl.where(a1 > 0.0, a1, 1.0)
        square = a1 * a1 - a2 * f
        root = t + f / (slope + tl.sqrt(tl.maximum(square, 0.0)))
        halley = t + 2.0 * f * slope / (4.0 * slope * slope - f * a2)
        back = tl.minimum(tl.maximum(0.5 * a2 * f / (slope * slope), 0.0), 1.0)
        step = tl.where(square > 0.0, root - back * (root - below), halley)
        step = tl.where(f < 0.0, root, step)
        lower = tl.where(f < 0.0, root, below)
        return step, lower, tl.where((f > 0.0) & (square > 0.0), root, float("inf"))
    else:
        return below, below, tl.full(t.shape, float("inf"), tl.float32)


@triton.jit
@no_type_check
def improve(t, a0, a1, a2, power, lower, upper, tolerance, trust, HALF: tl.constexpr):
    """Return the next t of every row, its bounds, and whether it is as good as it has to be.

    `trust`: where a0 is at most so far above 1, the step from there is taken without another look.
    """
    f = a0 - 1.0
    t_next, below, above = step_left(t, a0, 1.0, a1, a2, power, HALF)
    known = a1 > 0.0
    lower = tl.where(known, tl.maximum(lower, tl.minimum(below, upper)), lower)
    lower = tl.where(f > 0.0, tl.maximum(lower, t), lower)
    upper = tl.where(known, tl.minimum(upper, above), upper)
    upper = tl.maximum(tl.where(f < 0.0, tl.minimum(upper, t), upper), lower)
    # Bounds included: near the root they agree to the last digit, and halving would start anew.
    within = known & (t_next >= lower) & (t_next <= upper)
    t_next = tl.where(within, t_next, 0.5 * (lower + upper))
    # f' shrinks to the right: between the bounds the sum of the row changes by this at most.
    close = known & (f >= 0.0) & (power * a1 * (upper - lower) <= tolerance)
    done = close | (upper - lower <= 1.2e-7 * tl.abs(upper)) | (t_next == t)
    exact = (tl.abs(f) <= tolerance) | (f != f)
    sure = within & (f >= 0.0) & (f <= trust)
    return tl.where(exact & (sure == 0), t, t_next), lower, upper, done | exact | sure


@triton.jit
@no_type_check
def power_step(t, a0, goal, a1, inverse):
    """Return where a0 is `goal`, if `a0 ** inverse` falls linearly; a0 and a1 are not 0."""
    return t + 0.5 * a0 * (1.0 - tl.exp2(-tl.log2(a0 / goal) * inverse)) / (inverse * a1)


@triton.jit
@no_type_check
def further(t, top, passes):
    """Return the second t of a pass: far off first, as the guesses of 64 rows scatter."""
    return t + tl.where(passes == 0, 0.4, 0.1) * (top - t)


@triton.jit
@no_type_check
def approach(t, a0, a1, s, b0, b1, keys, lower, upper, tolerance, near):
    """Return the next t of every row, what A1 will be there, the bounds of tau, and if that is it.

    `a0` and `a1` are A0 and A1 at t, `b0` and `b1` those at s, further right, or 0 where they were
    not asked for. A power of A0 falls nearly linearly. Where tau lies in between, a cubic in it
    through both points with their slopes is taken; else the power law that fits both, from the
    nearer one, whose A0 must be as near to 1 as `near`.

    From one point A0 falls as the power `a1^2 / (a1^2 - a0 a2 / 2)` of a distance. `keys`, how many
    are visited, is more than a2: where nearly all of them have weight that tells the power,
    elsewhere 3.5 fits, and 6 near the root; there A0 must be as near to 1 as `tolerance`.
    """
    known, both = a1 > 0.0, b1 > 0.0
    a0, a1 = tl.where(known, a0, 1e-9), tl.where(known, a1, 1.0)
    b0, b1 = tl.where(both, b0, 1e-9), tl.where(both, b1, 1.0)
    lower = tl.where(known, tl.maximum(lower, t + 0.5 * (a0 - 1.0) / a1), lower)
    lower = tl.where(both, tl.maximum(lower, s + 0.5 * (b0 - 1.0) / b1), lower)
    upper = tl.where(both & (b0 < 1.0), tl.minimum(upper, s), upper)
    upper = tl.where(a0 < 1.0, tl.minimum(upper, t), upper)
    upper = tl.maximum(upper, lower)
    width = tl.maximum(s - t, 1e-9)
    alone = tl.where(tl.abs(a0 - 1.0) < 0.5, 1.0 / 6.0, 1.0 / 3.5)
    alone = tl.maximum(alone, 1.0 - 0.5 * keys * a0 / (a1 * a1))
    inverse = 0.5 * (a0 / a1 - b0 / b1) / width  # A0 / A1 of a power law falls linearly
    inverse = tl.where(both, tl.minimum(tl.maximum(inverse, 0.1), 0.5), alone)
    right = b0 >= 1.0
    nearer = tl.where(right, b0, a0)
    outside = power_step(tl.where(right, s, t), nearer, 1.0, tl.where(right, b1, a1), inverse)
    y, z = tl.exp2(0.2 * tl.log2(a0)), tl.exp2(0.2 * tl.log2(b0))
    step = tl.where(z < y, z - y, -1.0)
    c = (1.0 - y) / step
    first, last = -2.5 * step * a0 / (y * a1) - width, -2.5 * step * b0 / (z * b1) - width
    inside = t + c * width + c * (1.0 - c) * ((1.0 - c) * first - c * last)
    between = both & (a0 >= 1.0) & (b0 < 1.0)
    t_next = tl.where(between, inside, outside)
    t_next = tl.where(known, t_next, 0.5 * (lower + upper))
    t_next = tl.minimum(tl.maximum(t_next, lower), upper)
    slope = a1 + (b1 - a1) * (t_next - t) / width
    slope = tl.maximum(slope, 0.25 * tl.where(right, b1, a1))
    slope = tl.where(both, slope, a1 * tl.exp2(-tl.log2(a0) * (1.0 - inverse)))
    close = tl.abs(nearer - 1.0) <= tl.where(both, near, tolerance)
    done = between & (a0 - b0 <= 400.0 * near * near) | known & close
    return t_next, slope, lower, upper, done
