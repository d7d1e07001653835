"""One parameter out of a checkpoint, into memory that jax can use as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxinfer.checkpoint.names import HF_HEADS, Piece
from jaxinfer.checkpoint.source import TensorSource
from jaxinfer.errors import CorruptFile

# Read at a time: large enough to keep a disk busy, small beside the parameters themselves.
CHUNK_BYTES = 16 << 20
ALIGNMENT = 64  # bytes; from such an address jax on CPU takes an array over without a copy


Select = slice | np.ndarray  # features of a matrix: a range, or numbers of which -1 are zeros


def read_parts(
    source: TensorSource, piece: Piece, dtype: np.dtype, parts: Sequence[tuple[Select, Select]]
) -> list[np.ndarray]:
    """Read, dequantize, cast and reorder parts of one parameter.

    The file is read once, whatever the parts; peak memory is the result and about `CHUNK_BYTES`.

    Args:
      source: the checkpoint.
      piece: which tensor and rows; `names.check` has compared its shape with the tensor's.
      dtype: of the result.
      parts: which OUT and which IN features of the piece, each.

    Returns:
      A matrix of `dtype` a part, aligned for jax: [OUT,IN], or [IN,OUT] where piece.transposed.
    """
    count, columns = piece.stop - piece.start, math.prod(piece.source_shape[1:])
    matrices, targets = [], []
    for rows, cols in parts:
        shape = _count(rows), _count(cols)
        matrix = aligned_empty(shape[::-1] if piece.transposed else shape, dtype)
        if isinstance(rows, np.ndarray) or isinstance(cols, np.ndarray):
            matrix[...] = 0
        matrices.append(matrix)
        targets.append(matrix.T if piece.transposed else matrix)

    step = max(1, CHUNK_BYTES // (columns * np.dtype(dtype).itemsize))
    if piece.interleaved:  # whole heads
        step = max(1, step // piece.interleaved) * piece.interleaved
    for start in range(0, count, step):
        stop = min(start + step, count)
        taken = [_within(rows, start, stop) for rows, _ in parts]
        if not any(_count(here) for here, _ in taken):
            continue
        a, b = piece.start + start, piece.start + stop
        chunk = source.read(piece.source, a, b, np.dtype(dtype)).reshape(stop - start, columns)
        if piece.interleaved:
            chunk = deinterleave(chunk, piece.interleaved)
        for target, (here, there), (_, cols) in zip(targets, taken, parts, strict=True):
            if isinstance(cols, slice):
                target[there] = chunk[here, cols]
            else:  # columns of zeros stay as they are
                real = cols >= 0
                target[there, real] = chunk[here][:, cols[real]]
    for matrix in matrices if piece.add_one else ():
        matrix += np.ones((), matrix.dtype)
    return matrices


def _count(select: Select) -> int:
    return select.stop - select.start if isinstance(select, slice) else len(select)


def _within(rows: Select, start: int, stop: int) -> tuple[Select, Select]:
    """Those of `rows` in start:stop: where in the chunk that begins at start, where in the part."""
    if isinstance(rows, slice):
        a, b = max(rows.start, start), min(rows.stop, stop)
        b = max(a, b)
        return slice(a - start, b - start), slice(a - rows.start, b - rows.start)
    there = np.flatnonzero((rows >= start) & (rows < stop))
    return rows[there] - start, there


def deinterleave(chunk: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of q and k: [heads * H, columns], whole heads.

    The file has row 2i + j of a head where a model that rotates halves has row j * H/2 + i.
    """
    pairs = chunk.reshape(-1, head_dim // 2, 2, chunk.shape[1])
    return pairs.swapaxes(1, 2).reshape(chunk.shape)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As np.empty, from an address that is a multiple of `ALIGNMENT`."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    return raw[skip : skip + size].view(dtype).reshape(shape)


def check_tied_head(source: TensorSource, table: Piece) -> None:
    """Where the config ties the head but the checkpoint holds one: it must be the embedding table.

    A sample of rows is compared: a head that was trained, or never initialised, differs everywhere.

    Args:
      source: the checkpoint.
      table: the piece of embed/table.

    Raises:
      CorruptFile: the two differ, so that either the config or the checkpoint is wrong.
    """
    for head in set(HF_HEADS.values()) & set(source.shapes):
        vocab_size = table.source_shape[0]
        same = source.shapes[head] == table.source_shape
        for row in range(0, vocab_size, max(1, vocab_size // 16)) if same else ():
            a = source.read(head, row, row + 1, np.dtype(np.float32))
            b = source.read(table.source, row, row + 1, np.dtype(np.float32))
            same = same and np.array_equal(a, b)
        if not same:
            raise CorruptFile(
                f"{source.path}: tensor {head} differs from {table.source}, but"
                " tie_word_embeddings says that they are one; set it to false to use the head"
            )
