"""`cache_update` on TPU: reads, changes and writes back the aligned blocks that hold new slots.

A slot is not a unit that a TPU can write: bfloat16 lies in tiles of 16 slots, int8 in tiles of 32.
So a program takes one such block into VMEM, sets its new slots, and the same memory takes it back
(`input_output_aliases`). New rows find their slots by a product with a one-hot matrix: no finite
number changes (but for the sign of zero), and nothing shifts along the sublanes.

Letters: B batch, T new tokens, K kv heads, S slots, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.flash_tpu import LANES, block_of, slots_along_lanes

VMEM = 12 << 20  # bytes, of the 16 MiB that a kernel gets
TILES = {4: 8, 2: 16, 1: 32}  # bytes of a number -> slots of a tile


def cache_update_tpu(
    caches: Sequence[jax.Array],
    new: Sequence[jax.Array],
    start: jax.Array,  # [B] int32
    num_new: jax.Array,  # [B] int32
    block_table: jax.Array | None,  # [B,M] int32
) -> tuple[jax.Array, ...]:
    """See `cache_update`."""
    batch, tokens, num_kv = new[0].shape[:3]
    slots = caches[0].shape[2]
    size = _block(caches, tokens, paged=block_table is not None)
    steps = (tokens + size - 2) // size + 1  # blocks that so many tokens may touch
    one = block_table is None and slots == size  # a row's only block, which it may take twice

    # New tokens come in pieces of the same size, so that a block needs two of them at most.
    piece = min(tokens, size)
    padding = -tokens % piece
    pieces = (tokens + padding) // piece
    lanes = tuple(_lanes(x) for x in caches)
    views = _turned(caches, lanes)
    rows = _turned([_padded(jnp.swapaxes(x, 1, 2), padding) for x in new], lanes)

    def block(b: Any, w: Any, start: Any, num: Any, row: Any, at: Any) -> tuple[Any, Any]:
        return row[b * steps + w], at[b * steps + w]

    def piece_of(which: int, b: Any, w: Any, start: Any, num: Any, *rest: Any) -> tuple[Any, Any]:
        index = _piece(start[b], num[b], w, size, piece) + which if pieces > 1 else 0
        return b, jnp.clip(index, 0, pieces - 1)

    def spec(at: Any, x: jax.Array, length: int, lanes: bool) -> pl.BlockSpec:
        """Blocks of `length` slots, or tokens, of all heads."""
        if lanes:
            shape = (1, *x.shape[1:-1], length)
            return pl.BlockSpec(shape, lambda *a: (at(*a)[0], *[0] * (x.ndim - 2), at(*a)[1]))
        return pl.BlockSpec(
            (1, num_kv, length, x.shape[3]), lambda *a: (at(*a)[0], 0, at(*a)[1], 0)
        )

    held = tuple(spec(block, x, size, n) for x, n in zip(views, lanes, strict=True))
    fresh = tuple(
        tuple(spec(partial(piece_of, p), x, piece, n) for x, n in zip(rows, lanes, strict=True))
        for p in range(min(pieces, 2))
    )
    prefetch = (start, num_new, *_route(start, num_new, block_table, steps, slots, size))
    updated = pl.pallas_call(
        partial(
            _program,
            num_prefetch=len(prefetch),
            size=size,
            piece=piece,
            pieces=pieces,
            one=one,
            lanes=lanes,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(batch, steps),
            in_specs=[held, fresh],
            out_specs=held,
        ),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in views),
        input_output_aliases={len(prefetch) + n: n for n in range(len(caches))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=sum(2 * steps * x[0].size * x.dtype.itemsize for x in caches)
            * (batch * size)
            // slots,
        ),
        name="cache_update",
    )(*prefetch, views, (rows,) * len(fresh))
    return _turned(updated, lanes)


def _lanes(cache: jax.Array) -> bool:
    """Whether its slots lie along the lanes: [..,S] always, [..,S,H] where H is narrow."""
    return cache.ndim == 3 or slots_along_lanes(cache.shape[3])


def _turned(arrays: Sequence[jax.Array], lanes: tuple[bool, ...]) -> tuple[jax.Array, ...]:
    """[..,S,H] as the kernel takes it, and back."""
    return tuple(
        jnp.swapaxes(x, 2, 3) if n and x.ndim == 4 else x
        for x, n in zip(arrays, lanes, strict=True)
    )


def _padded(x: jax.Array, padding: int) -> jax.Array:
    """x [B,K,T,...] with so many more tokens."""
    return jnp.pad(x, [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 3))


def _route(
    start: jax.Array,
    num_new: jax.Array,
    table: jax.Array | None,
    steps: int,
    slots: int,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """Row or page [B*steps], and block of it, that each step writes, row after row."""
    batch, per_row = len(start), slots // size
    first, count = _touched(start[:, None], num_new[:, None], size)
    step = jnp.arange(steps)[None]
    at = first + step  # [B,steps]
    row = jnp.broadcast_to(jnp.arange(batch)[:, None], at.shape)
    if table is not None:
        page = jnp.minimum(at // per_row, table.shape[1] - 1)
        row = jnp.take_along_axis(table, page, axis=1)
    used = (step < count).reshape(-1)
    last = jax.lax.cummax(jnp.where(used, jnp.arange(batch * steps), -1))
    last = jnp.where(last < 0, jnp.argmax(used), last)
    return row.reshape(-1)[last], (at % per_row).reshape(-1)[last]


def _block(caches: Sequence[jax.Array], tokens: int, *, paged: bool) -> int:
    """Slots a block: a tile when few tokens are new, or all S where S is no multiple of a tile."""
    slots = caches[0].shape[2]
    tile = max(LANES if _lanes(x) else TILES[x.dtype.itemsize] for x in caches)
    size = block_of(slots, max(tile, min(tokens, LANES) // tile * tile), tile)
    if size is not None and not paged and tokens > slots - size + 1:
        size = None  # a call might end in the block that it began in, a lap later
    size = size or slots
    # Every block lies in VMEM four times: as it comes and as it goes, two of each in flight.
    held = 4 * sum(x[0].size * x.dtype.itemsize for x in caches) * size // slots
    if held > VMEM:
        raise UnsupportedError(
            f"cache {caches[0].shape}, {tokens} new: pallas_tpu needs S a multiple of {tile} and"
            f" T at most S - {tile}, or less than {VMEM >> 20} MiB a row"
        )
    return size


def _touched(start: Any, num: Any, size: int) -> tuple[Any, Any]:
    """First block by position that holds a new slot, and how many do; scalars."""
    first = start // size
    return first, jnp.where(num > 0, (start + num - 1) // size - first + 1, 0)


def _piece(start: Any, num: Any, w: Any, size: int, piece: int) -> Any:
    """Which piece of the new tokens holds the one that goes to the first slot of block w."""
    first, _ = _touched(start, num, size)
    return ((first + w) * size - start + piece) // piece - 1  # floor, of what may be negative


def _program(
    *refs: Any,
    num_prefetch: int,
    size: int,
    piece: int,
    pieces: int,
    one: bool,
    lanes: tuple[bool, ...],
) -> None:
    start_ref, num_ref = refs[:2]
    caches, fresh, *out = refs[num_prefetch:]
    b, w = pl.program_id(0), pl.program_id(1)
    start, num = start_ref[b], num_ref[b]
    first, count = _touched(start, num, size)
    begin = (first + w) * size - start  # which new token belongs to the block's first slot

    # A step without new tokens stays at the block of the one before, and leaves it as it is.
    @pl.when(((b == 0) & (w == 0)) | ((w < count) & ((w == 0) | (not one))))
    def _() -> None:
        for cache, to in zip(caches, out, strict=True):
            to[...] = cache[...]

    @pl.when(w < count)
    def _() -> None:
        first_piece = _piece(start, num, w, size, piece) if pieces > 1 else 0
        for which, group in enumerate(fresh):
            at = (first_piece + which) * piece  # token of the piece's first row
            for x, to, across in zip(group, out, lanes, strict=True):
                _set(x, to, at, begin, num, size, piece, across)


def _set(
    x: Any, to: Any, at: Any, begin: Any, num: Any, size: int, piece: int, lanes: bool
) -> None:
    """Put new tokens at .. at + piece into the slots of a block that begins with token `begin`."""

    def tokens(first: Any, length: int, lanes: bool) -> jax.Array:
        shape = (1, length) if lanes else (length, 1)
        return first + jax.lax.broadcasted_iota(jnp.int32, shape, int(lanes))

    slot, mine = tokens(begin, size, lanes), tokens(at, piece, lanes)
    hit = (slot >= jnp.maximum(at, 0)) & (slot < jnp.minimum(at + piece, num))
    one_hot = (slot == tokens(at, piece, not lanes)).astype(jnp.float32)
    for n in range(to.shape[1]):
        head = pl.ds(n, 1) if to.ndim == 3 else n  # [1,slots], or [H,slots], or [slots,H]
        # What stands behind num may be anything, and 0 * NaN is NaN.
        row = jnp.where(mine < num, x[0, head].astype(jnp.float32), 0.0)
        picked = _exact(row, one_hot) if lanes else _exact(one_hot, row)
        to[0, head] = jnp.where(hit, picked.astype(to.dtype), to[0, head])


def _exact(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in full float32: a one-hot matrix moves finite numbers and changes none."""
    return jax.lax.dot(
        a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
