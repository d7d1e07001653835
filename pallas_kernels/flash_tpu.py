"""Flash attention on TPU (arXiv 2205.14135): the one kernel behind both attention ops.

A program holds a block of queries of one row, `heads` kv heads at a time, and walks over blocks of
keys with a running maximum and sum. Its BlockSpecs fetch only blocks with keys that some query
sees: past the last of them the index stands still, and what stands still is not fetched again.

Letters: B batch, T new tokens, K kv heads, G query heads a kv head, S slots, H head width,
R = G * tokens of a query block, U = new tokens where they are keys.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.flash import Sums, join

LANES = 128
MAX_WHOLE = 1024  # slots that are one block where they are no multiple of the lanes


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut; all counts static."""

    heads: int  # kv heads a program; divides K
    tokens: int  # query tokens a program; divides T
    keys: int  # key slots a block; divides S
    blocks: int  # S / keys, or pages a row
    steps: int  # blocks that a program visits at most
    splits: int  # programs that share the keys of one query block
    lanes: bool  # slots lie along the lanes: k and v are [B,K,H,S]


class Tree(NamedTuple):
    """Queries that are no chain: query r sees its ancestors among the new tokens, itself too."""

    depth: Any  # [R,1] int32, its place behind `start`
    ancestors: Any  # [R,U] float32, 1 where it sees new token u


class Operands(NamedTuple):
    """What a program reads; None where the call has no such thing."""

    token: Any  # [R,1] int32, which of the block's tokens a query row is
    tree: Tree | None
    q: Any  # [B,K,T*G,H]
    k: Any  # [B,K,S,H], or [P,K,page,H]; the last two swapped where `lanes`
    v: Any
    k_scale: Any  # [B,K,S] float32, or [P,K,page]
    v_scale: Any


def block_of(size: int, target: int, tile: int) -> int | None:
    """The largest divisor of `size` that is a multiple of `tile` and at most `target`."""
    return next((n for n in range(target // tile * tile, 0, -tile) if size % n == 0), None)


def key_block(slots: int, target: int, window: int | None) -> int:
    """Slots a block of keys: at most `target`, a multiple of 128 that divides S, or all of S."""
    if window is not None:  # at both ends of a window lies a block that is read in part
        target = min(target, max(LANES, window // 4))
    block = block_of(slots, max(target, LANES), LANES)
    if block is None and slots > MAX_WHOLE:
        raise UnsupportedError(
            f"k {slots} slots: pallas_tpu needs a multiple of {LANES}, or at most {MAX_WHOLE}"
        )
    return slots if block is None else block


def visited(
    start: Any, num_new: Any, block: Any, tiling: Tiling, window: int | None
) -> tuple[Any, Any]:
    """First key block that query block number `block` sees, and how many from there; scalars.

    Blocks are counted by position, not by slot: in a ring, block n lies in slots of n mod `blocks`.
    """
    begin = block * tiling.tokens
    last = jnp.minimum(begin + tiling.tokens, num_new)
    first = 0 if window is None else jnp.maximum(start + begin - window + 1, 0) // tiling.keys
    count = (start + last + tiling.keys - 1) // tiling.keys - first
    return first, jnp.where(begin < last, count, 0)


def share_of(
    start: Any, num_new: Any, block: Any, split: Any, tiling: Tiling, window: int | None
) -> tuple[Any, Any]:
    """First key block of a split's share, and how many: every `splits`-th from there; scalars.

    Which split a key belongs to depends on its position alone, so that the sums of a query are the
    same bits whatever comes with it.
    """
    first, count = visited(start, num_new, block, tiling, window)
    skip = (split - first) % tiling.splits
    return first + skip, jnp.maximum((count - skip + tiling.splits - 1) // tiling.splits, 0)


def block_of_step(
    start: Any, num_new: Any, block: Any, split: Any, step: Any, tiling: Tiling, window: int | None
) -> Any:
    """The key block, by slot, that lies in VMEM at a step: its own, or the share's last one."""
    first, count = share_of(start, num_new, block, split, tiling, window)
    at = jnp.minimum(step, jnp.maximum(count - 1, 0))
    return (first + at * tiling.splits) % tiling.blocks


def blocks_fetched(
    start: jax.Array,
    num_new: jax.Array,
    programs: tuple[int, int],
    tiling: Tiling,
    window: int | None,
) -> int:
    """Key blocks that a call copies into VMEM, by walking its grid; `programs` are those of a row,
    over heads and over query blocks. What stands still from one step to the next is not copied."""
    sizes = (len(start), *programs, tiling.splits, tiling.steps)
    b, h, i, s, j = np.indices(sizes).reshape(5, -1)
    block = block_of_step(start[b], num_new[b], i, s, j, tiling, window)
    index = np.stack([b, h, np.asarray(block)])
    return 1 + int(np.count_nonzero((index[:, 1:] != index[:, :-1]).any(axis=0)))


def flash(
    start: jax.Array,  # [B] int32
    num_new: jax.Array,  # [B] int32
    table: jax.Array | None,  # [B,blocks] int32: pages instead of a dense cache
    x: Operands,
    *,
    tiling: Tiling,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> jax.Array:  # [B,K,T*G,H]
    """Attention of all queries; 0 for those behind num_new."""
    batch, num_kv, rows, head_dim = x.q.shape
    per_block = x.token.shape[0]
    grid = (batch, num_kv // tiling.heads, rows // per_block, tiling.splits, tiling.steps)

    def queries(b: Any, h: Any, i: Any, s: Any, j: Any, *refs: Any) -> tuple[Any, ...]:
        return b, h, i, 0

    def split_of(b: Any, h: Any, i: Any, s: Any, j: Any, *refs: Any) -> tuple[Any, ...]:
        return s, b, h, i, 0

    def fixed(*args: Any) -> tuple[int, int]:
        return 0, 0

    def keys(b: Any, h: Any, i: Any, s: Any, j: Any, *refs: Any) -> tuple[Any, ...]:
        """Row or page, heads and slots of a step's block."""
        block = block_of_step(refs[0][b], refs[1][b], i, s, j, tiling, window)
        return (b, h, block) if table is None else (refs[2][b, block], h, 0)

    def keys_4d(*args: Any) -> tuple[Any, ...]:
        row, head, block = keys(*args)
        return (row, head, 0, block) if tiling.lanes else (row, head, block, 0)

    tile = (head_dim, tiling.keys) if tiling.lanes else (tiling.keys, head_dim)
    kv = pl.BlockSpec((1, tiling.heads, *tile), keys_4d)
    kv_scale = None if x.k_scale is None else pl.BlockSpec((1, tiling.heads, tiling.keys), keys)
    tree = None if x.tree is None else Tree(*(pl.BlockSpec(a.shape, fixed) for a in x.tree))
    block = pl.BlockSpec((1, tiling.heads, per_block, head_dim), queries)
    token = pl.BlockSpec(x.token.shape, fixed)
    widths = Sums(head_dim, 1, 1)
    out_specs: Any = block
    out_shape: Any = jax.ShapeDtypeStruct(x.q.shape, x.q.dtype)
    if tiling.splits > 1:  # one result a split, joined below
        out_specs = Sums(
            *(pl.BlockSpec((1, 1, tiling.heads, per_block, w), split_of) for w in widths)
        )
        out_shape = Sums(
            *(
                jax.ShapeDtypeStruct((tiling.splits, batch, num_kv, rows, w), jnp.float32)
                for w in widths
            )
        )
    prefetch = (start, num_new) if table is None else (start, num_new, table)
    kernel = partial(
        _program,
        num_prefetch=len(prefetch),
        tiling=tiling,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    got = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=grid,
            in_specs=[Operands(token, tree, block, kv, kv, kv_scale, kv_scale)],
            out_specs=out_specs,
            scratch_shapes=[
                Sums(*(pltpu.VMEM((tiling.heads, per_block, w), jnp.float32) for w in widths))
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(x, tiling, grid, window),
        name="flash_attention",
    )(*prefetch, x)
    return got if tiling.splits == 1 else join(Sums(*got)).astype(x.q.dtype)


def _cost(
    x: Operands, tiling: Tiling, grid: tuple[int, ...], window: int | None
) -> pl.CostEstimate:
    """What a call reads and computes with a full cache; lengths are not known here."""
    per_block, head_dim = x.token.shape[0], x.q.shape[-1]
    blocks = float(tiling.blocks)
    if window is not None:  # on average over where a window begins
        span = window + tiling.tokens - 1
        blocks = min(blocks, (span + tiling.keys - 1) / tiling.keys)
    visits = int(grid[0] * grid[1] * grid[2] * tiling.heads * blocks)
    scales = 0 if x.k_scale is None else 4
    return pl.CostEstimate(
        flops=4 * visits * per_block * tiling.keys * head_dim,
        bytes_accessed=2 * x.q.nbytes
        + 2 * visits * tiling.keys * (head_dim * x.k.dtype.itemsize + scales),
        transcendentals=visits * per_block * tiling.keys,
    )


def _program(
    *refs: Any,
    num_prefetch: int,
    tiling: Tiling,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    start_ref, num_ref = refs[:2]
    x, *out, sums = refs[num_prefetch:]  # one result, or the Sums of a split
    b, i, s, j = (pl.program_id(n) for n in (0, 2, 3, 4))
    start, num_new = start_ref[b], num_ref[b]
    first, count = share_of(start, num_new, i, s, tiling, window)

    @pl.when(j == 0)
    def _() -> None:
        sums.acc[...] = jnp.zeros(sums.acc.shape, jnp.float32)
        sums.top[...] = jnp.full(sums.top.shape, -jnp.inf)
        sums.total[...] = jnp.zeros(sums.total.shape, jnp.float32)

    @pl.when(j < count)
    def _() -> None:
        begin = (first + j * tiling.splits) * tiling.keys  # position of the block's first slot
        key = begin + jax.lax.broadcasted_iota(jnp.int32, (1, tiling.keys), 1)
        visible = _visible(x, key, start, num_new, i * tiling.tokens, window)  # [R,keys]
        # Slots that no query sees may hold anything, and 0 * NaN is NaN.
        slot_shape, axis = ((1, tiling.keys), 1) if tiling.lanes else ((tiling.keys, 1), 0)
        slot = begin + jax.lax.broadcasted_iota(jnp.int32, slot_shape, axis)
        held = slot < start + num_new
        if window is not None:
            held &= slot > start + i * tiling.tokens - window
        for n in range(tiling.heads):
            q, k = x.q[0, n], x.k[0, n].astype(x.q.dtype)
            score = _dot(q, k, ((1,), (0 if tiling.lanes else 1,))) * scale  # [R,keys]
            if x.k_scale is not None:
                score *= x.k_scale[0, n : n + 1]
            if softcap is not None:
                score = softcap * jnp.tanh(score / softcap)
            score = jnp.where(visible, score, -jnp.inf)
            old = sums.top[n]
            top = jnp.maximum(old, jnp.max(score, axis=1, keepdims=True))
            base = jnp.where(top == -jnp.inf, 0.0, top)  # nothing seen yet
            weight, fade = jnp.exp(score - base), jnp.exp(old - base)
            sums.top[n] = top
            sums.total[n] = fade * sums.total[n] + jnp.sum(weight, axis=1, keepdims=True)
            if x.v_scale is not None:
                weight *= jnp.where(visible, x.v_scale[0, n : n + 1], 0.0)
            v = jnp.where(held, x.v[0, n].astype(jnp.float32), 0.0).astype(q.dtype)
            sums.acc[n] = fade * sums.acc[n] + _dot(weight.astype(q.dtype), v, ((1,), (axis,)))

    @pl.when(j == tiling.steps - 1)
    def _() -> None:
        if tiling.splits > 1:
            for part, held in zip(out, sums, strict=True):
                part[0, 0] = held[...]
        else:
            total = sums.total[...]
            out[0][0] = (sums.acc[...] / jnp.where(total == 0.0, 1.0, total)).astype(out[0].dtype)


def _visible(
    x: Operands, key: Any, start: Any, num_new: Any, begin: Any, window: int | None
) -> jax.Array:
    """[R,keys]: which keys, by position [1,keys], each query of the block sees."""
    token = begin + x.token[...]  # [R,1]
    query = start + (token if x.tree is None else x.tree.depth[...])
    in_window = True if window is None else key > query - window
    real = (token < num_new) & (key < start + num_new)
    if x.tree is None:
        return real & (key <= query) & in_window
    # A new key's column of the tree, picked by a product with a one-hot matrix.
    new = jax.lax.broadcasted_iota(jnp.int32, (x.tree.ancestors.shape[1], key.shape[1]), 0)
    among = _dot(x.tree.ancestors[...], (new == key - start).astype(jnp.float32), ((1,), (0,)))
    return real & ((among > 0.5) | ((key < start) & in_window))


def _dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int], tuple[int]]) -> jax.Array:
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (contract, ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def slots_along_lanes(head_dim: int) -> bool:
    """Whether a cache [..,S,H] lies with its slots along the lanes.

    XLA lays an array out that way where H would leave lanes empty, so [..,H,S] is then the same
    memory, and a kernel that asked for [..,S,H] would have the cache copied before every call.
    """
    return head_dim % LANES != 0


def as_tiled(cache: jax.Array, tiling: Tiling) -> jax.Array:
    """[..,S,H] as the kernel takes it."""
    return jnp.swapaxes(cache, -1, -2) if tiling.lanes else cache
