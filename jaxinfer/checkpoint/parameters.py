"""One parameter out of a checkpoint, into memory that jax can use as it is."""

from __future__ import annotations

import math

import numpy as np

from jaxinfer.checkpoint.names import HF_HEADS, Piece
from jaxinfer.checkpoint.source import TensorSource
from jaxinfer.errors import CorruptFile

# Read at a time: large enough to keep a disk busy, small beside the parameters themselves.
CHUNK_BYTES = 16 << 20
ALIGNMENT = 64  # bytes; from such an address jax on CPU takes an array over without a copy


def read_parameter(
    source: TensorSource, piece: Piece, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Read, dequantize, cast and reorder one parameter.

    Peak memory is the result and about `CHUNK_BYTES`.

    Args:
      source: the checkpoint.
      piece: which tensor and rows; `names.check` has compared its shape with the tensor's.
      shape: of the result: its elements in order are the piece's rows, or its columns.
      dtype: of the result.

    Returns:
      [*shape] `dtype`, aligned for jax.
    """
    count, columns = piece.stop - piece.start, math.prod(piece.source_shape[1:])
    out = aligned_empty((columns, count) if piece.transposed else (count, columns), dtype)
    by_row = out.T if piece.transposed else out
    step = max(1, CHUNK_BYTES // (columns * out.itemsize))
    if piece.interleaved:  # whole heads
        step = max(1, step // piece.interleaved) * piece.interleaved
    for start in range(0, count, step):
        rows = by_row[start : start + step]
        a = piece.start + start
        chunk = source.read(piece.source, a, a + len(rows), out.dtype).reshape(rows.shape)
        rows[...] = deinterleave(chunk, piece.interleaved) if piece.interleaved else chunk
    if piece.add_one:
        out += np.ones((), out.dtype)
    return out.reshape(shape)


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
