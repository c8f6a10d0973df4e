"""Decoding against dense float64 attention to every sequence alone, pages in any order."""

import pytest
import torch

from adasplash import adasplash, adasplash_decode, page_stats
from adasplash.kernels.decode import op
from adasplash.kernels.decode.bounds import launch_keep, reference_keep
from adasplash.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")


def inputs(lengths, heads, heads_kv, seq_q, dim, dim_value, places, dtype=torch.float32, gain=3.0):
    """Return q and a contiguous cache; what lies behind the end of a sequence is NaN."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    q = gain * draw(len(lengths), heads, seq_q, dim)
    k, v = (draw(len(lengths), heads_kv, places, size) for size in (dim, dim_value))
    for i, length in enumerate(lengths):
        k[i, :, length:], v[i, :, length:] = torch.nan, torch.nan
    q, k, v = (x.to(DEVICE, dtype) for x in (q, k, v))
    return q, k, v, torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def oracle(q, k, v, lengths, alpha=1.5, scale=None, mask=None):
    """Return the outputs one sequence at a time, by bisection in float64."""
    outputs = []
    if isinstance(alpha, torch.Tensor):
        alpha = alpha[:, None, None].double()
    for i, length in enumerate(lengths.tolist()):
        keys, values = (
            x[i, :, :length].double().repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v)
        )
        z = q[i].double() @ keys.mT * (alpha - 1)
        z = z * (q.shape[-1] ** -0.5 if scale is None else scale)
        rows = torch.arange(q.shape[2], device=q.device)[:, None]
        hidden = torch.arange(length, device=q.device) > length - q.shape[2] + rows
        if mask is not None:
            hidden = hidden | ~mask[i, :length]
        z = z.masked_fill(hidden, -torch.inf)
        high = z.amax(-1, keepdim=True)
        high = high.masked_fill(high == -torch.inf, 0.0)
        low = high - 1
        for _ in range(100):
            middle = (low + high) / 2
            more = (z - middle).clamp_min(0).pow(1 / (alpha - 1)).sum(-1, keepdim=True) >= 1
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        outputs.append((z - low).clamp_min(0).pow(1 / (alpha - 1)) @ values)
    return torch.stack(outputs)


def paged(k, v, size):
    """Return the cache cut into pages in random order, some unused, and the table."""
    batch, places = len(k), k.shape[2]
    count = -(-places // size)
    order = torch.randperm(batch * count + 3, generator=torch.Generator().manual_seed(1))
    table = order[: batch * count].view(batch, count).to(torch.int32)
    pages = []
    for x in (k, v):
        slab = torch.full((len(order), x.shape[1], size, x.shape[3]), torch.nan, dtype=x.dtype)
        whole = torch.nn.functional.pad(x.cpu(), (0, 0, 0, count * size - places), value=torch.nan)
        parts = whole.unflatten(2, (count, size)).transpose(1, 2)
        slab[table.long()] = parts
        pages.append(slab.to(k.device))
    return *pages, table.to(k.device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "heads_kv", "seq_q", "dim", "dim_value"),
    [(4, 2, 1, 16, 16), (2, 2, 1, 24, 40), (8, 1, 3, 32, 16), (3, 3, 5, 16, 8)],
)
def test_equals_dense_attention_in_float64(backend, heads, heads_kv, seq_q, dim, dim_value):
    q, k, v, lengths = inputs([7, 200, 65, 130], heads, heads_kv, seq_q, dim, dim_value, 210)
    found = adasplash_decode(q, k, v, lengths, backend=backend)
    want = oracle(q, k, v, lengths)
    assert found.shape == (4, heads, seq_q, dim_value)
    assert relative_error(found, want) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("stats", [False, True])
def test_pages_give_what_a_contiguous_cache_gives(backend, size, stats):
    q, k, v, lengths = inputs([130, 3, 64, 97], 4, 2, 2, 16, 16, 130)
    pages_k, pages_v, table = paged(k, v, size)
    bounds = page_stats(pages_k) if stats else None
    found = adasplash_decode(q, pages_k, pages_v, lengths, table, bounds, backend=backend)
    assert relative_error(found, oracle(q, k, v, lengths)) < 2e-6


@pytest.mark.parametrize("alpha", [1.1, 1.3, 1.8, 2.0])
def test_any_alpha_and_scale(alpha):
    q, k, v, lengths = inputs([90, 70], 2, 1, 1, 16, 16, 128)
    for scale in (0.1, -0.3):
        found = adasplash_decode(q, k, v, lengths, alpha=alpha, scale=scale, backend="triton")
        assert relative_error(found, oracle(q, k, v, lengths, alpha, scale)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_of_every_head(backend):
    q, k, v, lengths = inputs([90, 70], 4, 2, 2, 16, 16, 128)
    alpha = torch.tensor([1.1, 1.5, 1.7, 2.0], device=DEVICE)
    want = oracle(q, k, v, lengths, alpha)
    for given in (alpha, alpha.expand(2, 4)):
        found = adasplash_decode(q, k, v, lengths, alpha=given, backend=backend)
        assert relative_error(found, want) < 1e-5
    with pytest.raises(
        ValueError, match=r"`alpha` must have shape \(\), \(4,\) or \(2, 4\); got \(3,\)"
    ):
        adasplash_decode(q, k, v, lengths, alpha=alpha[:3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left", [0, 20, 500, -1])
def test_a_window_is_that_of_attention(backend, left):
    q, k, v, lengths = inputs([130, 64, 97], 4, 2, 2, 16, 16, 130)
    pages_k, pages_v, table = paged(k, v, 32)
    mask = torch.ones(3, 130, dtype=torch.bool, device=DEVICE)
    mask[0, 100::3] = False
    wide = torch.nn.functional.pad(mask, (0, 30), value=True)
    options = {"window": (left, 0), "backend": backend}
    stats = page_stats(pages_k)
    found = [
        adasplash_decode(q, k, v, lengths, key_padding_mask=mask, **options),
        adasplash_decode(q, pages_k, pages_v, lengths, table, stats, key_padding_mask=wide,
                         **options),
    ]  # fmt: skip
    for i, length in enumerate(lengths.tolist()):
        one = (x[i : i + 1] for x in (q, k[:, :, :length], v[:, :, :length]))
        want = adasplash(*one, window=(left, -1), backend="reference",
                         key_padding_mask=mask[i : i + 1, :length])  # fmt: skip
        assert all(relative_error(x[i : i + 1], want.double()) < 2e-6 for x in found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache", ["contiguous", "bounds", "pages"])
def test_hidden_keys_have_no_part(backend, cache):
    """Padding on the left, holes, and a sequence of which nothing is seen."""
    q, k, v, lengths = inputs([130, 64, 97], 4, 2, 1, 16, 16, 130)
    mask = torch.ones(3, 130, dtype=torch.bool, device=DEVICE)
    mask[0, :70], mask[0, 100::3], mask[1] = False, False, False
    want = oracle(q, k, v, lengths, mask=mask)
    # Without the mask these would take all the weight.
    k[0, :, :70] = 100 * q[0, ::2]
    arguments = [k, v, lengths]
    stats = None
    if cache == "pages":
        pages_k, pages_v, table = paged(k, v, 64)
        arguments = [pages_k, pages_v, lengths, table]
        mask = torch.nn.functional.pad(mask, (0, 62))
    elif cache == "bounds":
        k, v, mask = (torch.nn.functional.pad(x, pad) for x, pad in (
            (k, (0, 0, 0, 62)), (v, (0, 0, 0, 62)), (mask, (0, 62))))  # fmt: skip
        arguments, stats = [k, v, lengths, None], page_stats(k)
    found = adasplash_decode(
        q, *arguments, page_stats=stats, key_padding_mask=mask, backend=backend
    )
    assert relative_error(found, want) < 2e-6
    assert (found[1] == 0).all()


@pytest.mark.parametrize(
    "dtype",
    # The interpreter multiplies the bits of bfloat16.
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
)
def test_half_precision(dtype):
    q, k, v, lengths = inputs([300, 41], 4, 2, 1, 32, 32, 320, dtype)
    found = adasplash_decode(q, k, v, lengths, backend="triton")
    assert found.dtype == dtype
    budget = 4e-3 if dtype == torch.float16 else 2e-2
    assert relative_error(found, oracle(q, k, v, lengths)) < budget


def kept(rows, k, lengths, factor, seq_q=1):
    """Return the blocks that the bounds of pages do not refute."""
    low, high = page_stats(k)
    blocks = low.shape[2]
    listed, count = launch_keep(
        rows.contiguous(), k, low, high, lengths, None, seq_q, 64, blocks, None, 2 * factor
    )  # fmt: skip
    keep = torch.zeros(*k.shape[:2], blocks, dtype=torch.bool, device=k.device)
    for batch in range(len(k)):
        for head in range(k.shape[1]):
            keep[batch, head, listed[batch, head, : count[batch, head]].long()] = True
    return keep


def test_skipping_pages_is_exact_and_happens():
    """Keys that point away from the query in whole pages: most are skipped, no bit changes."""
    q, k, v, lengths = inputs([640, 600], 2, 1, 1, 16, 16, 640, gain=1.0)
    direction = torch.nn.functional.normalize(q.mean((1, 2)), dim=-1)
    sign = torch.where(torch.arange(640, device=DEVICE) // 64 == 4, 6.0, -6.0)
    k = 0.1 * k + (sign[:, None] * direction[:, None])[:, None]
    bounds = page_stats(k)
    keep = kept(q.transpose(1, 2).reshape(2, 1, 2, 16), k, lengths, 0.5)
    assert keep[:, 0, 4].all()
    assert keep.float().mean() < 0.5
    with_bounds = adasplash_decode(q, k, v, lengths, None, bounds, scale=1.0, backend="triton")
    without = adasplash_decode(q, k, v, lengths, scale=1.0, backend="triton")
    assert torch.equal(with_bounds, without)


@pytest.mark.parametrize("seq_q", [1, 3])
def test_bounds_never_drop_a_block_with_weight(seq_q):
    """And the kernels drop what plain PyTorch drops."""
    for seed in range(10):
        torch.manual_seed(seed)
        rows, k = torch.randn(2, 2, 3, 8, device=DEVICE), torch.randn(2, 2, 256, 8, device=DEVICE)
        k[:, :, 64:128] *= 0.05
        lengths = torch.tensor([256, 190], dtype=torch.int32, device=DEVICE)
        keep = kept(rows, k, lengths, 1.0, seq_q)
        z = rows @ k.mT
        last = lengths[:, None] - seq_q + torch.arange(3, device=DEVICE) % seq_q
        hidden = torch.arange(256, device=DEVICE) > last[:, None, :, None]
        z = z.masked_fill(hidden, -torch.inf)
        holds = (z > z.amax(-1, keepdim=True) - 1).unflatten(-1, (4, 64)).any(-1).any(2)
        assert (keep | ~holds).all()
        assert not keep[:, :, 1].all()
        same = keep == reference_keep(rows, k, *page_stats(k), lengths, seq_q, 64, 1.0)
        assert same.all() or (DEVICE == "cuda" and same.float().mean() > 0.8)  # TF32


def test_it_continues_what_attention_began():
    q, k, v = (torch.randn(1, 2, 50, 16, device=DEVICE) for _ in range(3))
    want = adasplash(q, k, v)[:, :, -1:]
    lengths = torch.tensor([50], device=DEVICE)
    for backend in BACKENDS:
        found = adasplash_decode(q[:, :, -1:], k, v, lengths, backend=backend)
        assert torch.allclose(found, want, atol=1e-5)


def test_a_nan_stays_in_its_head():
    q, k, v, lengths = inputs([70], 4, 2, 1, 16, 16, 80)
    q[0, 1] = torch.nan
    found = adasplash_decode(q, k, v, lengths, backend="triton")
    assert found[0, 1].isnan().all()
    assert found[0, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.0}, "`alpha` must be above 1, up to 2; got 1.0"),
        ({"backend": "best"}, "`backend` must be 'auto'"),
        ({"cache_seqlens": torch.tensor([2, 65])}, r"from 1, the new tokens, to 64.*\[2, 65\]"),
        ({"cache_seqlens": torch.tensor([2])}, r"`cache_seqlens` must have shape \(2,\)"),
        ({"k_cache": torch.randn(3, 2, 64, 16)}, "must fit together"),
        ({"v_cache": torch.randn(2, 2, 60, 16)}, "must fit together"),
        ({"q": torch.randn(2, 3, 1, 16)}, "divides 3, the heads of `q`; got 2"),
        ({"q": torch.randn(1, 4, 1, 16), "cache_seqlens": torch.tensor([2])}, "1 slabs"),
        ({"block_table": torch.zeros(1, 2, dtype=torch.int32)}, "must have 2 rows"),
        ({"key_padding_mask": torch.ones(2, 63, dtype=torch.bool)}, "as wide as the 64 places"),
        ({"key_padding_mask": torch.ones(1, 64, dtype=torch.bool)}, "must be bool with 2 rows"),
        ({"page_stats": op.PageStats(torch.zeros(1), torch.zeros(1))}, "`page_stats` must have"),
    ],
)
def test_errors(change, message, own_checks):
    given = {
        "q": torch.randn(2, 4, 1, 16), "k_cache": torch.randn(2, 2, 64, 16),
        "v_cache": torch.randn(2, 2, 64, 16), "cache_seqlens": torch.tensor([5, 64]),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        adasplash_decode(**{**given, **change})
    with pytest.raises(ValueError, match="must divide the 100 places"):
        page_stats(torch.randn(1, 1, 100, 4), 64)


def test_torch_knows_the_operator():
    q, k, v, lengths = inputs([50, 64], 4, 2, 1, 16, 16, 64)
    low, high = page_stats(k)
    for bounds in ((None, None), (low, high)):
        mask, alpha = (
            (None, None) if bounds[0] is None else (k[:, 0, :, 0] > 0, q[:, :, 0, 0] * 0 + 1.7)
        )
        arguments = (q, k, v, lengths, None, *bounds, mask, alpha, 0.25)
        torch.library.opcheck(op._decode, arguments, test_utils=("test_schema", "test_faketensor"))
