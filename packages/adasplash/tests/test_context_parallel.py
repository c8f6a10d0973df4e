"""A sequence spread over processes against one process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from adasplash import adasplash
from adasplash.testing import random_inputs
from fourfold_common import Results

RANKS = 2
CASES = {
    "causal": {},
    "causal, kernels": {"backend": "triton"},
    "not causal": {"is_causal": False},
    "not causal, kernels": {"is_causal": False, "backend": "triton"},
    "mask with holes": {"mask": True},
    "alpha per head": {"alpha": [1.2, 1.5, 1.9, 1.4]},
    "scale": {"scale": 0.5, "is_causal": False},
}


def _inputs(case):
    """Leaves q, k, v, the mask, alpha and the output's gradient of a case, whole."""
    options = dict(CASES[case])
    torch.manual_seed(3)
    q, k, v = random_inputs(1, 4, 2, 16 * RANKS, 16 * RANKS, 16, 24)
    mask = torch.rand(1, 16 * RANKS) > 0.3 if options.pop("mask", False) else None
    alpha = options.pop("alpha", 1.5)
    alpha = torch.tensor(alpha, requires_grad=True) if isinstance(alpha, list) else alpha
    grad = torch.randn(1, 4, 16 * RANKS, 24)
    return [x.requires_grad_() for x in (q, k, v)], mask, alpha, grad, options


def _work(rank, folder):
    """What every process does: all cases, and the checks that need a group."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from torch.distributed.device_mesh import init_device_mesh

    from adasplash import context_parallel as cp

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    found = {}
    for case in CASES:
        leaves, mask, alpha, grad, options = _inputs(case)
        parts = [cp.shard(leaf, mesh) for leaf in leaves]
        mask = None if mask is None else cp.shard(mask, None, 1)
        output = cp.attention(
            *parts, mesh, alpha, key_padding_mask=mask, **{"is_causal": True, **options}
        )
        whole = cp.unshard(output, mesh)
        whole.backward(grad)
        grads = [leaf.grad for leaf in leaves]  # of this rank's rows alone
        if isinstance(alpha, torch.Tensor):
            grads.append(alpha.grad)
        for x in grads:
            dist.all_reduce(x)
        found[case] = [whole.detach(), *grads]

    # The backward gathers anew: what is saved between the passes is a rank's own part.
    q, k, v = (cp.shard(x, mesh).detach().requires_grad_() for x in _inputs("causal")[0])
    sizes = []
    torch_gather = cp._gather
    output = cp.attention(q, k, v, mesh, backend="triton")
    cp._gather = lambda x, group, dim: sizes.append(x.shape[2]) or torch_gather(x, group, dim)
    output.sum().backward()
    found["gathered in the backward"] = sizes
    cp._gather = torch_gather
    output = cp.attention(q, k, v, mesh, backend="triton")
    with torch.no_grad():
        k.add_(1.0)
    messages = []
    for wrong in (
        lambda: output.sum().backward(),
        lambda: cp.shard(torch.zeros(1, 1, 6, 1), mesh),
        lambda: cp.attention(q[:, :, :3], k[:, :, :3], v[:, :, :3], mesh),
        lambda: cp.attention(q, k[:, :, :2], v, mesh),
        lambda: cp.attention(q[0], k, v, mesh),
        lambda: cp.shard(q, init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("a", "b"))),
    ):
        try:
            wrong()
            messages.append("")
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    found["messages"] = messages
    found["positions"] = cp.positions(8 * RANKS, mesh)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_work, (str(folder),), RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_the_spread_sequence_gives_what_one_process_gives(found, case):
    leaves, mask, alpha, grad, options = _inputs(case)
    output = adasplash(*leaves, alpha, key_padding_mask=mask, **options)
    output.backward(grad)
    for own in found:
        wanted = [output.detach(), *(leaf.grad for leaf in leaves)]
        if isinstance(alpha, torch.Tensor):
            wanted.append(alpha.grad)
        for x, y in zip(own[case], wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_gathered_keys_are_not_kept(found):
    """They are gathered anew, keys and values once each for both stripes."""
    assert [own["gathered in the backward"] for own in found] == [[16, 16]] * RANKS


def test_every_rank_has_as_many_scores_under_a_causal_mask(found):
    places = [own["positions"] for own in found]
    assert torch.cat(places).sort()[0].tolist() == list(range(8 * RANKS))
    assert len({int((p + 1).sum()) for p in places}) == 1


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (0, "changed in place before the backward"),
        (1, "must have a multiple of 4 tokens, two stripes for each of 2 ranks; got 6"),
        (2, "must have a multiple of 4 tokens, two stripes for each of 2 ranks; got 6"),
        (3, "`k` must hold 16 tokens of the sequence as `q` does; got 2"),
        (4, r"`q` must have 4 dimensions; got shape \(4, 16, 16\)"),
        (5, "`group` must be a device mesh of one dimension; got 2"),
    ],
)
def test_what_does_not_fit_is_refused(found, place, message):
    for own in found:
        assert re.search(message, own["messages"][place])


def test_without_a_group_the_message_says_what_to_call():
    from adasplash import context_parallel as cp

    with pytest.raises(ValueError, match="call `init_process_group` first"):
        cp.shard(torch.zeros(1, 1, 4, 1))


@pytest.mark.slow  # three processes import torch
def test_the_benchmark_checks_and_times_one_process_and_two(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "bench_context_parallel.py"
    command = [sys.executable, str(script), "--device", "cpu", "--output", str(tmp_path)]
    tiny = ["--length", "256", "--checked", "64", "--heads", "1", "--dim", "16", "--repeats", "1"]
    done = subprocess.run([*command, *tiny], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = Results.load(tmp_path / "context_parallel.json").cases
    assert {(c["parameters"]["ranks"], c["metric"]) for c in cases} == {
        (ranks, metric) for ranks in (1, RANKS) for metric in ("forward", "forward + backward")
    }
    assert all(c["median"] > 0 and 0 < c["error"] < 1e-2 for c in cases)
