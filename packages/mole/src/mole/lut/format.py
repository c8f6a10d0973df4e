"""Layout of the lookup table on disk.

A table is a folder with two files. `lut.safetensors` holds one tensor `rows`, uint8
`[vocab, row_stride]`: row `i` has the codes of all layers and experts of id `i`, layer by layer,
expert by expert, then the block scales, then zeros up to a multiple of 512 bytes. Its header fills
4,096 bytes, so that every row starts on a 512-byte boundary of the file. `lut.json` holds the
shape, the format, a CRC-32 for every chunk of rows, and the fingerprint of the weights.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from ..kernels.combine.reference import NF3_CODEBOOK, NF4_CODEBOOK, dequantise
from .errors import (
    LutError,
    LutFingerprintError,
    LutShapeError,
    LutTruncatedError,
    LutVersionError,
)

# What a layer's lookup reads: values, scales and index, as `combine` takes them.
LayerRows = tuple[Tensor, Tensor | None, Tensor | None]

VERSION = 1
HEADER_BYTES = 4096
ALIGNMENT = 512
DATA_FILE = "lut.safetensors"
META_FILE = "lut.json"
# Stored type of every format; those of a byte or less have scales beside the codes.
FORMATS: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "nf4": torch.uint8,
    "nf3": torch.uint8,
}
_SCALED = ("int8", "fp8", "nf4", "nf3")
_LARGEST_BLOCK, _NF3_BLOCK = 768, 128
# What the largest element of a block is scaled to.
_TOP = {"int8": 127.0, "fp8": 448.0, "nf4": 1.0, "nf3": 1.0}


@cache
def _largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor up to a limit; asked for in every step, so it is remembered."""
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


@dataclass(frozen=True)
class LutMeta:
    """What `lut.json` holds.

    Attributes:
        vocab: Number of ids, and of rows.
        layers: Number of layers with lookup experts.
        experts: Number of lookup experts in a layer.
        dim: Width of a vector.
        format: Name of the format, one of `FORMATS`.
        chunk: Rows covered by one checksum.
        crcs: CRC-32 of every chunk, padding included.
        fingerprint: Hash of the embeddings, norms and experts that the table was made from.
        version: Version of the layout.
    """

    vocab: int
    layers: int
    experts: int
    dim: int
    format: str
    chunk: int
    crcs: tuple[int, ...]
    fingerprint: str
    version: int = VERSION

    @cached_property
    def block(self) -> int:
        """Elements that share a scale: the largest divisor of `dim` up to 768, 128 for nf3."""
        return _largest_divisor(self.dim, _NF3_BLOCK if self.format == "nf3" else _LARGEST_BLOCK)

    @cached_property
    def stored(self) -> int:
        """Stored elements of one vector."""
        return {"nf4": self.dim // 2, "nf3": 3 * self.dim // 8}.get(self.format, self.dim)

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of a row's codes; even, as the scales behind them are float16."""
        size = self.layers * self.experts * self.stored * FORMATS[self.format].itemsize
        return size + size % 2

    @cached_property
    def scale_bytes(self) -> int:
        """Bytes of a row's scales, which are float16."""
        if self.format not in _SCALED:
            return 0
        return self.layers * self.experts * (self.dim // self.block) * 2

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row that mean something: what is read for one token."""
        return self.code_bytes + self.scale_bytes

    @cached_property
    def row_stride(self) -> int:
        """Bytes from one row to the next."""
        return -(-self.row_bytes // ALIGNMENT) * ALIGNMENT

    @cached_property
    def file_bytes(self) -> int:
        """Length of the data file."""
        return HEADER_BYTES + self.vocab * self.row_stride

    def spans(self, counts: Iterable[int]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Yield the parts of a row that groups of layers need, in the order they need them.

        A group is given as its first layer and where its parts begin and end, in bytes, multiples
        of 8. The first group brings all scales. Layers that are left over make the last group.

        Args:
            counts: Layers of every group.
        """
        size, begin = self.code_bytes // self.layers, 0
        for count in (*counts, self.layers):
            end = min(begin + count, self.layers)
            if begin == end:
                continue
            parts = [(begin * size // 8 * 8, min(-(-end * size // 8) * 8, self.row_stride))]
            if begin == 0 and self.scale_bytes:
                parts.append((self.code_bytes // 8 * 8, self.row_stride))
            yield begin, parts
            begin = end

    def header(self) -> bytes:
        """Return the first 4,096 bytes of the data file: a safetensors header, padded."""
        size = self.vocab * self.row_stride
        tensor = {
            "dtype": "U8",
            "shape": [self.vocab, self.row_stride],
            "data_offsets": [0, size],
        }
        text = json.dumps({"rows": tensor}).encode()
        length = HEADER_BYTES - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    def save(self, path: Path) -> None:
        """Write `lut.json`, whole or not at all."""
        partial = path.with_name(path.name + ".tmp")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, folder: str | Path) -> "LutMeta":
        """Return what `folder/lut.json` holds.

        Raises:
            LutTruncatedError: There is no such file.
            LutVersionError: It is not the description of a table, or of another version.
        """
        path = Path(folder) / META_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise LutTruncatedError(
                f"`path` must be the folder of a lookup table with a file {META_FILE}; "
                f"{path} cannot be read ({error.strerror}). `mole convert` makes a table."
            ) from None
        except ValueError:
            content = None
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or not names <= set(content):
            raise LutVersionError(f"{path} does not describe a lookup table; convert again.")
        if content["version"] != VERSION:
            raise LutVersionError(
                f"{path} has version {content['version']!r}; this package reads version {VERSION}."
            )
        if content["format"] not in tuple(FORMATS):
            raise LutVersionError(
                f"{path} has format {content['format']!r}; known are {', '.join(FORMATS)}."
            )
        for name in ("vocab", "layers", "experts", "dim", "chunk"):
            if not isinstance(content[name], int) or content[name] < 1:
                raise LutVersionError(
                    f"{path}: `{name}` must be a number of at least 1; got {content[name]!r}. "
                    "Convert the model again."
                )
        crcs = content["crcs"]
        if not isinstance(crcs, list):
            raise LutVersionError(f"{path}: `crcs` must be a list; got {crcs!r}.")
        return cls(**{name: content[name] for name in names} | {"crcs": tuple(crcs)})

    def check_fits(self, config: Any) -> None:
        """Raise an error if the table is not that of a model with this configuration.

        Raises:
            LutShapeError: Vocabulary, layers, experts or width differ.
            LutFingerprintError: The configuration names another fingerprint.
        """
        expected = {
            "vocab": config.vocab_size,
            "layers": len(config.lookup_layers),
            "experts": config.num_lookup_experts,
            "dim": config.hidden_size,
        }
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise LutShapeError(
                    f"The table must have `{name}` {value} as the model does; "
                    f"got {getattr(self, name)}. Convert the model again."
                )
        wanted = (config.lut or {}).get("fingerprint", self.fingerprint)
        if wanted != self.fingerprint:
            raise LutFingerprintError(
                f"The table must have the fingerprint {wanted[:16]}... that the model's "
                f"configuration names; got {self.fingerprint[:16]}...: experts or embeddings "
                "changed after conversion. Convert the model again."
            )


@dataclass(frozen=True)
class LutRows:
    """Rows of a table, for a flat list of tokens.

    Attributes:
        codes: Stored values, `[tokens, layers, experts, stored]`.
        scales: Factors of the blocks, `[tokens, layers, experts, blocks]`, or None.
        bits: Bits of a packed code.
        index: The row that is each token's, where tokens share rows; else every token has its own.
    """

    codes: Shaped[Tensor, "tokens layers experts stored"]
    scales: Float[Tensor, "tokens layers experts blocks"] | None
    bits: int = 4
    index: Int[Tensor, " wanted"] | None = None

    @classmethod
    def from_bytes(cls, rows: UInt8[Tensor, "tokens row_stride"], meta: LutMeta) -> "LutRows":
        """Return views of whole rows as they are on disk."""
        # Every token comes this way: `narrow` and `view` are the quickest to call.
        vectors, dtype = (len(rows), meta.layers, meta.experts), FORMATS[meta.format]
        size = meta.layers * meta.experts * meta.stored * dtype.itemsize
        codes = rows.narrow(1, 0, size).view(dtype).view(*vectors, meta.stored)
        if not meta.scale_bytes:
            return cls(codes, None)
        scales = rows.narrow(1, meta.code_bytes, meta.scale_bytes).view(torch.float16)
        blocks = meta.dim // meta.block
        return cls(codes, scales.view(*vectors, blocks), 3 if meta.format == "nf3" else 4)

    def to_bytes(self, meta: LutMeta) -> UInt8[Tensor, "tokens row_stride"]:
        """Return whole rows as they go to disk, padding included."""
        size = (len(self.codes), meta.row_stride)
        rows = torch.zeros(size, dtype=torch.uint8, device=self.codes.device)
        codes = self.codes.flatten(1).contiguous().view(torch.uint8)
        rows[:, : codes.shape[1]] = codes
        if self.scales is not None:
            rows[:, meta.code_bytes : meta.row_bytes] = (
                self.scales.flatten(1).contiguous().view(torch.uint8)
            )
        return rows

    @classmethod
    def encode(cls, values: Float[Tensor, "tokens layers experts dim"], meta: LutMeta) -> "LutRows":
        """Return the rows that stand for float32 values in the format of `meta`.

        Raises:
            LutError: A value is not finite, or too large for the format.
        """
        largest = values.abs().max().item() if values.numel() else 0.0
        if not largest < float("inf"):  # NaN included
            raise LutError("The experts give values that are not finite; the model is broken.")
        dtype = FORMATS[meta.format]
        if meta.scale_bytes == 0:
            if largest > torch.finfo(dtype).max:
                raise LutError(
                    f"`fmt` {meta.format!r} holds values up to {torch.finfo(dtype).max:g}; the "
                    f"experts give {largest:g}. Use 'bf16'."
                )
            return cls(values.to(dtype), None)
        blocks = values.unflatten(-1, (-1, meta.block))
        top = _TOP[meta.format]
        scales = (blocks.abs().amax(-1) / top).to(torch.float16)
        if not bool(scales.isfinite().all()):
            raise LutError(
                f"`fmt` {meta.format!r} holds values up to {65504 * top:g}; the experts give "
                f"{largest:g}. Use 'bf16'."
            )
        ratios = blocks / scales.float().clamp_min(2.0**-24)[..., None]
        ratios = ratios.flatten(-2)
        if meta.format == "int8":
            return cls(ratios.round().clamp(-127, 127).to(torch.int8), scales)
        if meta.format == "fp8":
            return cls(ratios.clamp(-top, top).to(dtype), scales)
        book = NF4_CODEBOOK if meta.format == "nf4" else NF3_CODEBOOK
        codebook = torch.tensor(book, device=values.device)
        middles = (codebook[1:] + codebook[:-1]) / 2
        picks = torch.bucketize(ratios, middles).to(torch.uint8)
        if meta.format == "nf3":
            return cls(_pack3(picks), scales, 3)
        low, high = picks.chunk(2, dim=-1)
        return cls(low | high << 4, scales)

    def decode(self, dtype: torch.dtype) -> Float[Tensor, "tokens layers experts dim"]:
        """Return the values as floating-point numbers."""
        return dequantise(self.codes, self.scales, dtype, self.bits)

    def layers(self, dtype: torch.dtype) -> Iterable[LayerRows]:
        """Return values, scales and index of every layer, ready for `combine`.

        On the CPU all layers are decoded at once; on other devices codes stay codes, which the
        kernel decodes.
        """
        if self.codes.device.type == "cpu":
            return [(values, None, self.index) for values in self.decode(dtype).unbind(1)]
        scales = [None] * self.codes.shape[1] if self.scales is None else self.scales.unbind(1)
        return [
            (codes, scale, self.index)
            for codes, scale in zip(self.codes.unbind(1), scales, strict=True)
        ]

    def to(self, device: torch.device) -> "LutRows":
        """Return the rows on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        index = None if self.index is None else self.index.to(device)
        return LutRows(self.codes.to(device), scales, self.bits, index)


def _pack3(picks: UInt8[Tensor, "*vectors dim"]) -> UInt8[Tensor, "*vectors stored"]:
    """Return 3-bit codes packed as `dequantise` reads them."""
    low = [part << 2 * i for i, part in enumerate((picks & 3).chunk(4, dim=-1))]
    high = [part << i for i, part in enumerate((picks >> 2).chunk(8, dim=-1))]
    return torch.cat((sum(low[1:], low[0]), sum(high[1:], high[0])), dim=-1)


__all__ = ["DATA_FILE", "FORMATS", "HEADER_BYTES", "META_FILE", "LayerRows", "LutMeta", "LutRows"]
