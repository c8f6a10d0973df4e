"""The admit operation: new rows, kept rows, both; the wait for the host."""

import pytest
import torch

from mole.kernels.admit import admit, hold

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
STRIDE = 8704


def random_bytes(rows, seed):
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, STRIDE), dtype=torch.uint8, generator=made)


def on_host(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype, pin_memory=CUDA)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("part", [(0, None), (0, 512), (4104, 8704), (8, 8)])
def test_rows_come_from_where_they_are_and_new_ones_stay(backend, part):
    kept, landing = random_bytes(7, 0), random_bytes(3, 1)
    # A token: kept in slot 5; new for slot 2, twice; new but not to be kept; kept in slot 0.
    slots, landed = torch.tensor([[5, 2, 2, -1, 0], [-1, 1, 1, 2, -1]], device=DEVICE)
    table = kept.to(DEVICE)
    out = torch.full((5, STRIDE), 9, dtype=torch.uint8, device=DEVICE)
    source = landing.pin_memory() if CUDA else landing
    admit(table, slots, source, landed, out, *part, backend=backend)
    rows = torch.stack([kept[5], landing[1], landing[1], landing[2], kept[0]])
    expected = torch.full((5, STRIDE), 9, dtype=torch.uint8)
    expected[:, slice(*part)] = rows[:, slice(*part)]
    assert torch.equal(out.cpu(), expected)
    kept[2, slice(*part)] = landing[1, slice(*part)]
    assert torch.equal(table.cpu(), kept)


def test_an_answer_that_is_there_lets_all_go_on():
    ready, turn = on_host(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32, device=DEVICE)
    told, known = on_host(2, 5), torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    ready.fill_(3)
    for count in range(2):
        told.copy_(torch.arange(10).view(2, 5) + count)
        hold(ready, turn, told, known)
        assert torch.equal(known.cpu(), told)
    assert (turn.item(), ready.item()) == (3, 3)


@pytest.mark.gpu
def test_the_device_goes_on_when_the_host_answers():
    ready, turn = on_host(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32, device="cuda")
    told, known = on_host(2, 5), torch.zeros(2, 5, dtype=torch.int64, device="cuda")
    after = torch.cuda.Event()
    hold(ready, turn, told, known)
    after.record()
    assert not after.query()
    told.fill_(7)
    ready[0] = 1
    after.synchronize()
    assert turn.item() == 1
    assert (known == 7).all()


@pytest.mark.usefixtures("our_checks_only")
def test_bad_arguments_are_named():
    one = torch.tensor([0])
    rows = torch.zeros(1, STRIDE, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"`out` must have shape \(1, 8704\).*got \(2, 8704\)"):
        admit(rows, one, rows, one, rows.repeat(2, 1))
    with pytest.raises(ValueError, match="multiples of 8 from 0 to 8704; got 4, 8704"):
        admit(rows, one, rows, one, rows.clone(), first=4)
    with pytest.raises(ValueError, match="'auto', 'triton' or 'reference'; got 'cuda'"):
        admit(rows, one, rows, one, rows.clone(), backend="cuda")
