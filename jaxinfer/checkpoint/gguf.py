"""`GGUFFile`: tensors and metadata of a GGUF file, versions 2 and 3, little-endian.

The layout: magic, version, two counts; the metadata (key, type, value); a record a tensor (name,
dimensions innermost first, type, offset); padding; data. The header is read once, front to back,
and every count and length is compared with the bytes left before anything is read or allocated.
Dequantization is `gguf.quants`; only the parser is ours, because the package's own takes seconds on
a large vocabulary and trusts the file.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxinfer.checkpoint.source import (
    Extent,
    corrupt,
    label,
    one_line,
    read_rows,
    refuse_lfs_pointer,
    regular_file_size,
    unreadable,
)
from jaxinfer.errors import CorruptFile, UnsupportedModel

# Several times the largest known; they bound the time and memory that a header can ask for.
MAX_HEADER = 64 << 20  # bytes
MAX_COUNT = 1 << 16  # tensors; metadata keys
MAX_KEY = 1 << 16  # bytes of a key or a tensor's name
MAX_DIMS = 4

STRING, ARRAY = 8, 9
# Metadata type number -> numpy type. Booleans (7) are a byte that must be 0 or 1.
SCALARS = {
    **{0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4"},
    **{6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"},
}

# Tensor types that are numbers already.
NUMBERS: dict[str, np.dtype] = {
    **{"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")},
    **{"BF16": np.dtype(ml_dtypes.bfloat16), "I8": np.dtype("i1"), "I16": np.dtype("<i2")},
    **{"I32": np.dtype("<i4"), "I64": np.dtype("<i8")},
}

# gguf.quants works on 16 rows at a time: rows of this many elements keep it in the CPU's caches
# and out of the interpreter, four times as fast as the 640-element rows of a small model.
ROW_ELEMENTS = 4096


class GGUFFile:
    """An open-and-closed GGUF file: the header is in memory, tensors are read when asked for.

    Attributes:
      path: the file.
      metadata: key -> int, float, bool, str (bytes where it is not UTF-8), list of those strings,
        or a read-only numpy array of numbers.
      types: tensor name -> quantization type, such as "F32" or "Q4_K".
      shapes: tensor name -> shape, outermost dimension first.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the header.

        Raises ModelNotFound, CorruptFile or UnsupportedModel, each with one line.
        """
        self.path = Path(path)
        size = regular_file_size(self.path)
        try:
            with open(self.path, "rb") as file:
                header = _Header(self.path, file, size)
                self.metadata: Mapping[str, Any] = header.metadata()
                records = header.tensor_records()
        except OSError as error:
            raise unreadable(self.path, error) from None
        _refuse_part(self.path, self.metadata)
        alignment = _alignment(self.path, self.metadata, size)
        start = -(-header.position // alignment) * alignment
        self._extents = _extents(self.path, records, start, alignment, size)
        self.shapes: Mapping[str, tuple[int, ...]] = {n: e.shape for n, e in self._extents.items()}
        self.types: Mapping[str, str] = {record.name: record.kind.name for record in records}
        for kind in {record.kind for record in records}:
            _refuse_undecodable(self.path, kind)

    def read(self, name: str, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """See `TensorSource.read`."""
        return read_rows(self.path, self._extents, name, start, stop, dtype)

    def read_blocks(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start:stop of a tensor as they lie in the file: uint8 [blocks, bytes of a block]."""
        extent = self._extents[name]
        raw = dataclasses.replace(
            extent,
            shape=(
                extent.shape[0],
                math.prod(extent.shape[1:]) // extent.block * extent.block_bytes,
            ),
            block=1,
            block_bytes=1,
            decode=lambda data: data,
        )
        rows = read_rows(self.path, {name: raw}, name, start, stop, np.dtype(np.uint8))
        return rows.reshape(-1, extent.block_bytes)


class _Record(NamedTuple):
    """What the header says of one tensor."""

    name: str
    shape: tuple[int, ...]  # outermost dimension first
    kind: GGMLQuantizationType
    offset: int  # bytes, from the start of the data


class _Header:
    """Reads a header front to back; `left` counts the bytes that may still be believed."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.file = file
        self.limit = min(size, MAX_HEADER)
        self.left = self.limit
        magic = self.take(4, "the magic number")
        if magic != b"GGUF":
            refuse_lfs_pointer(path, magic)
            raise corrupt(path, f"is no GGUF file: it begins with {magic!r}")
        version = self.number("<u4", "the version")
        if version in (1 << 24, 2 << 24, 3 << 24):
            raise UnsupportedModel(f"{label(path)}: big-endian GGUF files are not supported")
        if version == 0:
            raise corrupt(path, "the version is 0")
        if version not in (2, 3):
            raise UnsupportedModel(
                f"{label(path)}: GGUF version {version} is not supported, only 2 and 3"
            )
        self.num_tensors = self.number("<u8", "the tensor count")
        self.num_keys = self.number("<u8", "the metadata count")
        for count, what in (self.num_tensors, "tensor"), (self.num_keys, "metadata"):
            if count > MAX_COUNT:
                raise corrupt(path, f"the {what} count is {count}, above {MAX_COUNT}")

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self.limit - self.left

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes; `what` names the field they belong to."""
        if count > self.left:
            raise self.beyond(count, what)
        self.left -= count
        data = self.file.read(count)
        if len(data) != count:
            raise corrupt(self.path, f"{what}: the file ends early")
        return data

    def beyond(self, count: int, what: str) -> CorruptFile:
        """The error for a field that wants more bytes than there are."""
        where = "the file" if self.limit < MAX_HEADER else f"the {MAX_HEADER >> 20} MB of a header"
        return corrupt(self.path, f"{what} needs {count} bytes, but {where} has {self.left} left")

    def number(self, dtype: str, what: str) -> Any:
        """One number as a Python scalar."""
        return self.array(dtype, 1, what)[0].item()

    def array(self, dtype: str, count: int, what: str) -> np.ndarray:
        """`count` numbers: dtype [count], read-only."""
        raw = np.frombuffer(self.take(count * np.dtype(dtype).itemsize, what), dtype)
        if dtype == "?" and (raw.view(np.uint8) > 1).any():
            raise corrupt(self.path, f"{what} holds a boolean that is neither 0 nor 1")
        return raw

    def strings(self, count: int, what: str) -> list[str | bytes]:
        """`count` strings. Inlined, because a vocabulary holds hundreds of thousands."""
        if count * 8 > self.left:  # each begins with its length
            raise self.beyond(count * 8, what)
        out: list[str | bytes] = []
        read, left = self.file.read, self.left
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            left -= 8 + length
            if left < 0:
                self.left = max(left + length, 0)
                raise self.beyond(length, f"a string of {what}")
            text = read(length)
            try:
                out.append(text.decode())
            except UnicodeDecodeError:
                out.append(text)
        if self.file.tell() != self.limit - left:
            raise corrupt(self.path, f"{what}: the file ends early")
        self.left = left
        return out

    def name(self, what: str) -> str:
        """A key or a tensor's name, which must be UTF-8 text."""
        length = self.number("<u8", f"the length of {what}")
        if not 0 < length <= MAX_KEY:
            raise corrupt(self.path, f"{what} is {length} bytes long; expected 1 to {MAX_KEY}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise corrupt(self.path, f"{what} is not UTF-8") from None

    def metadata(self) -> dict[str, Any]:
        """Every key and its value."""
        out: dict[str, Any] = {}
        for i in range(self.num_keys):
            key = self.name(f"metadata key {i}")
            if key in out:
                raise corrupt(self.path, f"metadata key {one_line(key)} appears twice")
            out[key] = self.value(one_line(key))
        return out

    def value(self, key: str) -> Any:
        """The value of a key: its type and what follows."""
        kind = self.number("<u4", f"the type of {key}")
        if kind == STRING:
            return self.strings(1, key)[0]
        if kind in SCALARS:
            return self.number(SCALARS[kind], key)
        if kind != ARRAY:
            raise UnsupportedModel(f"{label(self.path)}: {key} has unknown metadata type {kind}")
        kind = self.number("<u4", f"the item type of {key}")
        count = self.number("<u8", f"the length of {key}")
        if kind == STRING:
            return self.strings(count, key)
        if kind in SCALARS:
            return self.array(SCALARS[kind], count, key)
        what = "arrays" if kind == ARRAY else f"unknown metadata type {kind}"
        raise UnsupportedModel(f"{label(self.path)}: {key} is an array of {what}")

    def tensor_records(self) -> list[_Record]:
        """The record of every tensor, in the order of the file."""
        out = []
        names = set()
        for i in range(self.num_tensors):
            name = self.name(f"the name of tensor {i}")
            shown = f"tensor {one_line(name)}"
            if name in names:
                raise corrupt(self.path, f"{shown} appears twice")
            names.add(name)
            num_dims = self.number("<u4", f"{shown}: the number of dimensions")
            if not 1 <= num_dims <= MAX_DIMS:
                raise corrupt(self.path, f"{shown} has {num_dims} dimensions, not 1 to {MAX_DIMS}")
            dims = self.array("<u8", num_dims, f"{shown}: the dimensions").tolist()
            number = self.number("<u4", f"{shown}: the type")
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise UnsupportedModel(
                    f"{label(self.path)}: {shown} has unknown quantization type {number}"
                ) from None
            offset = self.number("<u8", f"{shown}: the offset")
            out.append(_Record(name, tuple(reversed(dims)), kind, offset))
        return out


def _refuse_part(path: Path, metadata: Mapping[str, Any]) -> None:
    """A model split over several files: the others hold the rest of the tensors."""
    count = metadata.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        raise UnsupportedModel(
            f"{label(path)}: is one of {count} parts of a model; join them with"
            " `llama-gguf-split --merge` first"
        )


def _alignment(path: Path, metadata: Mapping[str, Any], size: int) -> int:
    """Bytes that the data, and every tensor in it, is aligned to."""
    alignment = metadata.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int):
        raise corrupt(path, "general.alignment is not a whole number")
    if alignment < 1 or alignment & (alignment - 1) or alignment > max(size, 32):
        raise corrupt(
            path, f"general.alignment is {alignment}; expected a power of two within the file"
        )
    return alignment


def _extents(
    path: Path, records: list[_Record], start: int, alignment: int, size: int
) -> dict[str, Extent]:
    """Where each tensor lies, once all are known to lie inside the file and apart.

    `start` is where the data begins, `size` the length of the file, both in bytes.
    """
    out = {}
    end, previous = 0, ""
    for name, shape, kind, offset in sorted(records, key=lambda record: record.offset):
        shown = f"tensor {one_line(name)}"
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape:
            raise corrupt(path, f"{shown} has a dimension of size 0")
        if shape[-1] % block:
            raise corrupt(
                path, f"{shown} has rows of {shape[-1]}; {kind.name} needs a multiple of {block}"
            )
        if offset % alignment:
            raise corrupt(path, f"{shown} begins at {offset}, not a multiple of {alignment}")
        if offset < end:
            raise corrupt(path, f"{shown} overlaps tensor {one_line(previous)}")
        num_bytes = math.prod(shape) // block * block_bytes
        end, previous = offset + num_bytes, name
        if start + end > size:
            raise corrupt(
                path, f"{shown} ends at byte {one_line(start + end)}, but the file has {size}"
            )
        decode: Callable[[np.ndarray], np.ndarray] = (
            functools.partial(np.ndarray.view, dtype=NUMBERS[kind.name])
            if kind.name in NUMBERS
            else functools.partial(_dequantize, kind=kind)
        )
        out[name] = Extent(path, start + offset, shape, block, block_bytes, decode)
    return out


def _dequantize(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """uint8 [blocks * bytes] -> float32 [blocks * elements]."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    # Both are powers of two, so the rows are whole blocks.
    row = math.gcd(raw.size // block_bytes * block, ROW_ELEMENTS)
    with np.errstate(all="ignore"):  # corrupt scales may be inf or nan: the numbers say so
        return quants.dequantize(raw.reshape(-1, row // block * block_bytes), kind).reshape(-1)


def _refuse_undecodable(path: Path, kind: GGMLQuantizationType) -> None:
    """Types that gguf names but cannot dequantize, found by trying one block."""
    if kind.name in NUMBERS:
        return
    try:
        _dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except NotImplementedError:
        raise UnsupportedModel(
            f"{label(path)}: quantization type {kind.name} is not supported"
        ) from None
