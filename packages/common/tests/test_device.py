import pytest
import torch

from fourfold_common import pick_device, pick_dtype


def test_auto_picks_a_cuda_device_exactly_when_there_is_one() -> None:
    device, reason = pick_device()
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert reason


def test_a_requested_device_is_taken() -> None:
    assert pick_device("cpu") == (torch.device("cpu"), "requested")


def test_unknown_device_names_the_argument_and_the_value() -> None:
    with pytest.raises(ValueError, match=r"`request` must be 'auto' or .*got 'gpu'"):
        pick_device("gpu")


def test_a_missing_device_is_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=rf"'cuda:{count}', but this machine has {count} CUDA"):
        pick_device(f"cuda:{count}")


def test_auto_dtype_on_cpu_is_float32() -> None:
    assert pick_dtype("auto", "cpu")[0] is torch.float32


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float64"])
def test_a_requested_dtype_is_taken(name: str) -> None:
    assert pick_dtype(name) == (getattr(torch, name), "requested")


def test_unknown_dtype_lists_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"one of 'auto', 'float32', .*; got 'int8'"):
        pick_dtype("int8")


@pytest.mark.gpu
def test_auto_dtype_on_a_gpu_is_half_as_wide() -> None:
    assert pick_dtype("auto", "cuda")[0] in {torch.bfloat16, torch.float16}
