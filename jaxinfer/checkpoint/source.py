"""`TensorSource`: named tensors of a checkpoint, read lazily, by rows; and what its readers share.

A reader believes nothing that a file says before the file's size bounds it. Data comes through
`os.pread` in chunks, never through a memory map: mapped pages would count as resident memory, and a
file that is cut short while it is mapped kills the process instead of raising an error.
"""

from __future__ import annotations

import dataclasses
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxinfer.errors import CorruptFile, InvalidArgument, ModelNotFound

# Decoded at a time: fits the CPU's caches, and its temporaries are small beside any real tensor.
CHUNK_ELEMENTS = 1 << 20


class TensorSource(Protocol):
    """Named tensors of a checkpoint, read lazily, by rows."""

    path: Path
    # Row-major as numpy has it: a linear layer is (out, in) whatever the format.
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """Rows start:stop along axis 0, dequantized and cast: `dtype` [stop - start, *shape[1:]].

        A scalar reads as its one row. Raises CorruptFile when the tensor is not there or its data
        ends early, InvalidArgument when the rows are outside the tensor.
        """
        ...


def one_line(value: object, limit: int = 60) -> str:
    """`value` as at most `limit` printable characters; a longer text loses its middle.

    Names come from strangers: they may hold newlines, terminal codes or megabytes.
    """
    text = str(value)
    if len(text) > limit:
        half = (limit - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return "".join(c if c.isprintable() else "?" for c in text)


def label(path: Path) -> str:
    """The path as error messages show it."""
    return one_line(path, 120)


def corrupt(path: Path, detail: str) -> CorruptFile:
    """The one-line error of a malformed file; `detail` names the field and what was wrong."""
    return CorruptFile(f"{label(path)}: {detail}")


def reason(error: Exception) -> str:
    """What the system says of a path it could not follow."""
    return getattr(error, "strerror", None) or one_line(error)


def unreadable(path: Path, error: Exception) -> ModelNotFound:
    """The one-line error of a file that the system does not let us read."""
    return ModelNotFound(f"{label(path)}: cannot be read: {reason(error)}")


def regular_file_size(path: Path) -> int:
    """Bytes of the file. Never opens it: opening a FIFO blocks, opening a device may do anything.

    Raises ModelNotFound for a path that is missing or a folder, CorruptFile for any other non-file.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: no text that a path can hold
        raise unreadable(path, error) from None
    if stat.S_ISDIR(status.st_mode):
        raise ModelNotFound(f"{label(path)}: is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise corrupt(path, "is not a regular file")
    return status.st_size


def refuse_lfs_pointer(path: Path, head: bytes) -> None:
    """Raise CorruptFile when `head`, 4 to 8 bytes, begins the text that git leaves in its place."""
    if b"version ".startswith(head):
        raise corrupt(path, "is a git-lfs pointer, not the model itself; run `git lfs pull`")


@dataclasses.dataclass(frozen=True)
class Extent:
    """Where a tensor lies in its file, and how its bytes become numbers."""

    path: Path
    offset: int  # of the first byte, from the start of the file
    shape: tuple[int, ...]
    block: int  # elements that are decoded together (1 unless quantized)
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]  # uint8 [n * block_bytes] -> number [n * block]


def read_rows(
    path: Path, extents: Mapping[str, Extent], name: str, start: int, stop: int, dtype: np.dtype
) -> np.ndarray:
    """`TensorSource.read` for the source at `path`; decodes `CHUNK_ELEMENTS` at a time."""
    if name not in extents:
        raise corrupt(path, f"tensor {one_line(name)} is missing")
    extent = extents[name]
    shape, block = extent.shape or (1,), extent.block
    if not 0 <= start <= stop <= shape[0]:
        raise InvalidArgument(
            f"{label(extent.path)}: rows {start}:{stop} of {one_line(name)}, which has {shape[0]}"
        )
    out = np.empty((stop - start, *shape[1:]), dtype)
    flat = out.reshape(-1)
    row = math.prod(shape[1:])
    first, last = start * row, stop * row  # elements of the flat tensor
    try:
        with open(extent.path, "rb", buffering=0) as file:
            # In whole blocks: only a one-dimensional quantized tensor can be cut inside one.
            for a in range(first // block * block, last, CHUNK_ELEMENTS):
                b = min(a + CHUNK_ELEMENTS, -(-last // block) * block)
                count = (b - a) // block * extent.block_bytes
                offset = extent.offset + a // block * extent.block_bytes
                raw = os.pread(file.fileno(), count, offset)
                if len(raw) != count:
                    raise corrupt(extent.path, f"tensor {one_line(name)}: the data ends early")
                values = extent.decode(np.frombuffer(raw, np.uint8))
                lo, hi = max(a, first), min(b, last)
                flat[lo - first : hi - first] = values[lo - a : hi - a]
    except OSError as error:
        raise unreadable(extent.path, error) from None
    return out
