"""Which variant of a kernel a launch takes."""

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from adasplash import adasplash
from adasplash.kernels import launch as module
from adasplash.kernels.attention import tiles
from adasplash.testing import oracle_weights, random_inputs, relative_error


class _Kernel:
    """What a launch sees of a compiled kernel `(x, y, WIDTH, DEEP)`: it notes what it is given."""

    arg_names = ("x", "y", "WIDTH", "DEEP")

    def __init__(self):
        self.fn, self.asked, self.direct, self.warmed = object(), [], [], []

    def warmup(self, *args, grid, **constants):
        assert not self.asked  # before any of them runs
        self.warmed.append((grid, args, constants))

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.asked.append((grid, args, constants))
            variant = len(self.asked)

            class Compiled:
                def __getitem__(_, grid):
                    return lambda *args: self.direct.append((variant, grid, args))

            return Compiled()

        return run


def test_a_variant_is_asked_for_once(monkeypatch):
    monkeypatch.setattr(module, "interpreted", lambda kernel: False)
    monkeypatch.setattr(module, "_variants", {})
    kernel, other = _Kernel(), _Kernel()
    first = {"DEEP": True, "WIDTH": 8, "num_warps": 4}
    module.launch(kernel, 3, ("a",), 1, 2, **first)
    assert kernel.asked == [((3,), (1, 2), first)]
    module.launch(kernel, 5, ("a",), 3, 4, **first)  # other arguments: the same variant
    assert kernel.direct == [(1, (5, 1, 1), (3, 4, 8, True))]  # constants in the kernel's order
    module.launch(kernel, 5, ("b",), 3, 4, **first)
    module.launch(kernel, 5, ("a",), 3, 4, **{**first, "DEEP": False})
    module.launch(kernel, 5, ("a",), 3, 4, **{**first, "num_warps": 8})
    module.launch(other, 5, ("a",), 3, 4, **first)
    assert len(kernel.asked) == 4
    assert len(other.asked) == 1
    module.launch(kernel, 7, ("b",), 5, 6, **first)
    assert kernel.direct[1:] == [(2, (7, 1, 1), (5, 6, 8, True))]


def test_what_is_missing_is_compiled_together_and_launched_in_order(monkeypatch):
    monkeypatch.setattr(module, "interpreted", lambda kernel: False)
    monkeypatch.setattr(module, "_variants", {})
    known, kernel, other = _Kernel(), _Kernel(), _Kernel()
    constants = {"DEEP": True, "WIDTH": 8}
    module.launch(known, 2, (), 0, 0, **constants)
    with module.SideBySide():
        module.launch(known, 3, (), 1, 2, **constants)  # nothing to wait for yet
        assert len(known.direct) == 1
        module.launch(kernel, 3, (), 1, 2, **constants)
        module.launch(known, 4, (), 3, 4, **constants)  # after what waits
        module.launch(other, 5, (), 5, 6, **constants)
        assert not kernel.asked
        assert len(known.direct) == 1
    assert kernel.warmed == kernel.asked == [((3,), (1, 2), constants)]
    assert other.warmed == other.asked == [((5,), (5, 6), constants)]
    assert [x[1] for x in known.direct] == [(3, 1, 1), (4, 1, 1)]
    with module.SideBySide():
        module.launch(other, 6, (), 7, 8, **constants)
        assert len(other.direct) == 1

    def fail():
        with module.SideBySide():
            module.launch(known, 3, ("new",), 1, 2, **constants)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    module.launch(known, 9, (), 1, 2, **constants)  # at once, outside
    assert len(known.direct) == 3


@pytest.mark.parametrize(
    ("make", "copied"),
    [
        (lambda: torch.randn(2, 3, 5, 16), False),
        (lambda: torch.randn(2, 5, 3, 16).transpose(1, 2), False),
        (lambda: torch.randn(2, 3, 5, 32)[..., 4:20], False),
        (lambda: torch.randn(2, 3, 5, 32)[..., 1:17], True),  # begins between two units
        (lambda: torch.randn(2, 3, 5, 10), True),
        (lambda: torch.randn(1, 1, 1, 10)[:, :, :, :7], False),  # strides that are never used
        (lambda: torch.randn(2, 3, 16, 5).mT, True),
        (lambda: torch.randn(2, 1, 5, 16).expand(2, 3, 5, 16), True),
    ],
)
def test_a_descriptor_holds_what_triton_would_put_in_it(make, copied):
    for _ in range(2):  # the second time from what is known
        x = make()
        held = tiles.aligned(x)
        assert (held is not x) == copied
        assert torch.equal(held, x)
        found = tiles.describe(held, 32)
        strides = [s if n > 1 else 64 for s, n in zip(held.stride(), held.shape, strict=True)]
        block = [1, 1, 32, tiles.padded(x.shape[-1])]
        want = TensorDescriptor(held, list(held.shape), [*strides[:-1], 1], block)
        assert found.base is held
        assert vars(found).keys() == vars(want).keys()
        assert all(getattr(found, n) == getattr(want, n) for n in vars(want) if n != "base")


@pytest.mark.gpu
def test_variants_are_not_mixed_up_on_the_gpu():
    """Alignments, lengths, head sizes and heads that alternate, each after the others."""
    masks = torch.rand(1, 131, device="cuda") < 0.8
    for _ in range(2):
        for dim, length, first in ((64, 128, 0), (64, 129, 1), (72, 129, 2), (65, 16, 3)):
            q, k, v = random_inputs(
                1, 4, 2, length, length, dim, dtype=torch.float32, device="cuda"
            )
            mask = masks[:, first : first + length]
            alphas = torch.full((5,), 1.4, device="cuda")[first % 2 :][:4]
            for alpha in (1.5, alphas):
                found = adasplash(q, k, v, alpha, key_padding_mask=mask)
                value = 1.5 if alpha is not alphas else 1.4
                weights = oracle_weights(q, k, True, mask, alpha=value)
                want = weights @ v.double().repeat_interleave(2, 1)
                assert relative_error(found, want) < 1e-4
