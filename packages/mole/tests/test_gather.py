"""The gather operation: whole rows and parts, unknown ids."""

import pytest
import torch

from mole.kernels.gather import gather

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture
def table():
    made = torch.randint(0, 256, (19, 8704), dtype=torch.uint8, generator=torch.manual_seed(0))
    return made.pin_memory() if CUDA else made


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("part", [(0, None), (0, 512), (4104, 8704), (8, 8)])
def test_bytes_are_copied_exactly(table, backend, part):
    ids = torch.tensor([3, 18, 0, 3, 7], device=DEVICE)
    out = torch.full((5, 8704), 9, dtype=torch.uint8, device=DEVICE)
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    gather(table, ids, out, flag, *part, backend=backend)
    expected = torch.full((5, 8704), 9, dtype=torch.uint8)
    expected[:, slice(*part)] = table[ids.cpu(), slice(*part)]
    assert torch.equal(out.cpu(), expected)
    assert flag.item() == 0


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("wrong", [19, -1, 2**40])
def test_unknown_ids_give_zeros_and_set_the_flag(table, backend, wrong):
    ids = torch.tensor([3, wrong], device=DEVICE)
    out = torch.full((2, 8704), 9, dtype=torch.uint8, device=DEVICE)
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    gather(table, ids, out, flag, backend=backend)
    assert torch.equal(out[0].cpu(), table[3])
    assert not out[1].any()
    assert flag.item() == 1


@pytest.mark.usefixtures("our_checks_only")
def test_bad_arguments_are_named(table):
    ids, flag = torch.tensor([1]), torch.zeros(1, dtype=torch.int32)
    out = torch.zeros(1, 8704, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"`out` must have shape \(1, 8704\); got \(2, 8704\)"):
        gather(table, ids, out.repeat(2, 1), flag)
    with pytest.raises(ValueError, match="multiples of 8 from 0 to 8704; got 4, 8704"):
        gather(table, ids, out, flag, first=4)
