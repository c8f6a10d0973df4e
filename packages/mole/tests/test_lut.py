"""The table's format: what is written is what is read, and damage is noticed."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from mole import LutStore, open_lut, verify
from mole.lut import (
    FORMATS,
    DeviceStore,
    LutChecksumError,
    LutError,
    LutFingerprintError,
    LutMeta,
    LutRows,
    LutShapeError,
    LutTruncatedError,
    LutVersionError,
    MmapStore,
)


def meta_of(fmt, vocab=5, layers=3, experts=2, dim=16):
    return LutMeta(vocab, layers, experts, dim, fmt, vocab, (), "")


@pytest.mark.parametrize(
    ("fmt", "bound"),
    [
        ("fp32", 0),
        ("fp16", 2**-11),
        ("bf16", 2**-8),
        ("int8", 0.5 / 127),
        ("fp8", 2**-4),
        ("nf4", 0.16),
        ("nf3", 0.24),
    ],
)
def test_decoded_values_are_close_to_the_encoded(fmt, bound):
    values = torch.randn(5, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    found = LutRows.encode(values, meta_of(fmt)).decode(torch.float32)
    # Half a step of the format, relative to the value itself or to its block's largest.
    scale = values.abs() if fmt in ("fp32", "fp16", "bf16", "fp8") else values.abs().amax(-1, True)
    assert ((found - values).abs() <= 1.01 * bound * scale + 1e-7).all()


@given(
    st.sampled_from(sorted(FORMATS)),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([8, 24, 512, 776]),
)
def test_rows_survive_the_way_to_bytes_and_back(fmt, vocab, layers, experts, dim):
    meta = meta_of(fmt, vocab, layers, experts, dim)
    rows = LutRows.encode(torch.randn(vocab, layers, experts, dim), meta)
    raw = rows.to_bytes(meta)
    assert raw.shape == (vocab, meta.row_stride)
    assert meta.row_stride % 512 == 0
    assert meta.row_stride - 512 < meta.row_bytes <= meta.row_stride
    back = LutRows.from_bytes(raw, meta)
    assert torch.equal(back.codes, rows.codes)
    assert (back.scales is None) == (rows.scales is None)
    if rows.scales is not None:
        assert torch.equal(back.scales, rows.scales)


def test_nf4_takes_the_nearest_code():
    from mole.kernels.combine.reference import NF4_CODEBOOK

    values = torch.linspace(-1, 1, 64).view(1, 1, 1, 64)
    found = LutRows.encode(values, meta_of("nf4", 1, 1, 1, 64)).decode(torch.float32)
    nearest = [min(NF4_CODEBOOK, key=lambda c: abs(c - float(v))) for v in values.flatten()]
    torch.testing.assert_close(found.flatten(), torch.tensor(nearest))


def test_a_block_of_zeros_stays_zero():
    for fmt in FORMATS:
        rows = LutRows.encode(torch.zeros(1, 1, 1, 8), meta_of(fmt, 1, 1, 1, 8))
        assert torch.equal(rows.decode(torch.float32), torch.zeros(1, 1, 1, 8))


@pytest.mark.parametrize(
    ("fmt", "value", "message"),
    [
        ("fp16", 70000.0, "`fmt` 'fp16' holds values up to 65504; .* give 70000. Use 'bf16'"),
        ("int8", 1e30, "`fmt` 'int8' holds values up to .*Use 'bf16'"),
        ("fp32", float("nan"), "values that are not finite"),
        ("bf16", float("inf"), "values that are not finite"),
    ],
)
def test_values_that_a_format_cannot_hold_are_refused(fmt, value, message):
    values = torch.zeros(1, 1, 1, 8)
    values[..., 3] = value
    with pytest.raises(LutError, match=message):
        LutRows.encode(values, meta_of(fmt, 1, 1, 1, 8))


def test_file_is_plain_safetensors(fp16):
    meta = LutMeta.load(fp16)
    with safe_open(fp16 / "lut.safetensors", "pt") as file:
        assert list(file.keys()) == ["rows"]
        raw = file.get_tensor("rows")
    assert torch.equal(
        LutRows.from_bytes(raw, meta).codes, MmapStore(fp16).rows(torch.arange(60)).codes
    )


def test_stores_give_identical_rows(table):
    ids = torch.tensor([[3, 0, 59], [3, 3, 17]])
    mapped, held = open_lut(table), open_lut(table, store="device", device="cpu")
    assert isinstance(mapped, MmapStore)
    assert isinstance(held, DeviceStore)
    assert isinstance(mapped, LutStore)
    a, b = mapped.rows(ids), held.rows(ids)
    assert a.codes.shape[:3] == (6, 2, 4)
    assert torch.equal(a.codes, b.codes)
    if a.scales is not None:
        assert torch.equal(a.scales, b.scales)


def test_intact_table_is_verified(table):
    assert verify(table) == LutMeta.load(table)


@pytest.mark.parametrize("place", [5, 4096, -1])  # header, first row, padding of the last row
def test_a_changed_byte_is_found(table, place):
    path = table / "lut.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(LutChecksumError, match="Convert the model again"):
        verify(table)


def test_checksum_error_names_the_ids(fp16):
    path = fp16 / "lut.safetensors"
    data = bytearray(path.read_bytes())
    data[4096 + 8 * LutMeta.load(fp16).row_stride] ^= 1
    path.write_bytes(data)
    with pytest.raises(LutChecksumError, match="ids 7 to 13 must have the checksum"):
        verify(fp16)


@pytest.mark.parametrize("check", [open_lut, verify])
def test_a_truncated_file_is_refused(fp16, check):
    path = fp16 / "lut.safetensors"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(LutTruncatedError, match=f"must have {size:,} bytes; got {size - 1:,}"):
        check(fp16)
    path.unlink()
    with pytest.raises(LutTruncatedError, match="got 0"):
        check(fp16)


def test_a_folder_without_table_is_refused(tmp_path):
    with pytest.raises(LutTruncatedError, match=r"`path` must be the folder .* lut\.json"):
        open_lut(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "has version 9; this package reads version 1"),
        ({"format": "nf2"}, "has format 'nf2'; known are fp32"),
        ({"vocab": None}, "does not describe a lookup table"),
    ],
)
def test_descriptions_that_cannot_be_read_are_refused(fp16, change, message):
    path = fp16 / "lut.json"
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    with pytest.raises(LutVersionError, match=message):
        open_lut(fp16)
    path.write_text("{")
    with pytest.raises(LutVersionError, match="does not describe a lookup table"):
        open_lut(fp16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crcs": []}, r"lut.json must have a checksum for each of 9 chunks; got 0"),
        ({"crcs": 5}, "`crcs` must be a list; got 5"),
        ({"chunk": 0}, "`chunk` must be a number of at least 1; got 0"),
        ({"vocab": "60"}, "`vocab` must be a number of at least 1; got '60'"),
        ({"format": ["fp16"]}, r"has format \['fp16'\]; known are fp32"),
    ],
)
def test_a_damaged_description_is_not_taken_for_an_intact_table(fp16, change, message):
    path = fp16 / "lut.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((LutVersionError, LutChecksumError), match=message):
        verify(fp16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 61}, "`vocab` 61 as the model does; got 60"),
        ({"lookup_layers": [0]}, "`layers` 1 as the model does; got 3"),
        ({"num_lookup_experts": 2}, "`experts` 2 as the model does; got 4"),
        ({"hidden_size": 36}, "`dim` 36 as the model does; got 32"),
    ],
)
def test_a_table_of_another_shape_is_refused(fp16, make_mole, change, message):
    model = make_mole(lookup_form="table", **change)
    with pytest.raises(LutShapeError, match=message):
        model.open_lut(fp16)
    assert model.lut is None


def test_a_table_of_other_weights_is_refused(fp16, make_mole):
    model = make_mole(lookup_form="table", lut={"path": "lut", "fingerprint": "0" * 64})
    with pytest.raises(LutFingerprintError, match="must have the fingerprint 0000000000000000"):
        model.open_lut(fp16)
    with pytest.raises(LutFingerprintError, match="experts or embeddings changed"):
        verify(fp16, make_mole(seed=5))
    assert verify(fp16, make_mole()).fingerprint == LutMeta.load(fp16).fingerprint
