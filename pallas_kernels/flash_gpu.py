"""Flash attention on NVIDIA's Hopper, what both attention ops share (arXiv 2205.14135, 2407.08608).

A program is a few warpgroups. One fetches blocks of keys and values into a ring of buffers in
shared memory; each of the others, a reader, holds 64 rows of queries, as many as wgmma multiplies
at a time, and walks over the blocks with a running maximum and sum.

Letters: B batch, T new tokens, N query heads, K kv heads, G = N / K, S slots, H head width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import UnsupportedError

ROWS = 64  # query rows a reader
LOG2E = math.log2(math.e)
LOWEST = -1e30  # a maximum over nothing: finite, so that exp2(-inf - LOWEST) is 0 and not NaN
PARAMS = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
)


class KV(NamedTuple):
    """Refs of keys and values: in a ring [stages,keys,H], or the cache itself."""

    k: Any  # bfloat16, or int8 with scales
    v: Any
    k_scale: Any  # [stages,keys] float32, or None
    v_scale: Any


class Ring(NamedTuple):
    """Blocks of keys and values on their way through shared memory, and who may touch them."""

    kv: KV
    wide: Any  # [keys,H] bfloat16, what wgmma reads of int8, or None
    k_ready: Any  # [stages] barriers: the block has arrived
    v_ready: Any
    k_free: Any  # [stages] barriers: every reader is done with the block
    v_free: Any
    zeroed: Any  # barrier: the last block's values are fit to be multiplied


class Span(NamedTuple):
    """Key blocks of a program, by position: block i holds positions i * keys and on."""

    first: Any
    low: Any  # low..high-1: every query sees every key
    high: Any
    last: Any  # one behind the last


class Sums(NamedTuple):
    """Softmax in progress of one reader's queries; `top` in units of log2."""

    acc: Any  # [ROWS,H] float32, sum of exp2(score - top) * v
    top: Any  # [ROWS] float32
    total: Any  # [ROWS] float32, sum of exp2(score - top)


def check(q: jax.Array, k: jax.Array, scale: float, *, int8: bool = False) -> None:
    """Refuse what the kernels do not cover."""
    if q.dtype != jnp.bfloat16 or k.dtype != (jnp.int8 if int8 else jnp.bfloat16):
        raise UnsupportedError(
            f"q is {q.dtype}, the keys {k.dtype}: pallas_gpu takes bfloat16, and int8 with scales"
        )
    if q.shape[3] not in (64, 128, 192, 256):
        raise UnsupportedError(f"H={q.shape[3]}: pallas_gpu takes 64, 128, 192 and 256")
    if scale <= 0:
        raise UnsupportedError(f"scale={scale}: pallas_gpu takes a positive one")
    device = jax.devices()[0]
    # Without a GPU somebody interprets, or compiles for one.
    capability = str(getattr(device, "compute_capability", "9.0"))
    if not capability.startswith("9."):
        raise UnsupportedError(
            f"{device.device_kind}: pallas_gpu needs compute capability 9.x, this is {capability}"
        )


def key_block(slots: int, target: int) -> int:
    """Slots a block of keys: the largest multiple of 64, at most `target`, that divides `slots`."""
    sizes = [n for n in range(target // 64 * 64, 0, -64) if slots % n == 0]
    if not sizes:
        raise UnsupportedError(f"k has {slots} slots (a page): pallas_gpu needs a multiple of 64")
    return sizes[0]


def span(
    start: Any,
    begin: Any,
    end: Any,
    *,
    keys: int,
    window: int | None,
    split: Any = 0,
    splits: int = 1,
) -> Span:
    """What new tokens begin..end-1 of a row see, and of that the part `split` of `splits`."""
    seen = 0 if window is None else jnp.maximum(start + begin - window + 1, 0) // keys
    count = jnp.where(begin < end, (start + end + keys - 1) // keys - seen, 0)
    share = (count + splits - 1) // splits
    first = seen + jnp.minimum(split * share, count)
    last = seen + jnp.minimum((split + 1) * share, count)
    low = 0 if window is None else (jnp.maximum(start + end - window, 0) + keys - 1) // keys
    low = jnp.minimum(jnp.maximum(low, first), last)
    high = jnp.minimum(jnp.maximum((start + begin) // keys, low), last)
    return Span(first, low, high, last)


def take_registers(readers: int, *, fetching: bool) -> None:
    """First of all a group gives up registers or takes more: addresses need few, sums many.

    A program starts with the same number for each group, in eights, of 512 (a thread of every
    group). With one reader that is as many as a thread can use.
    """
    if readers == 1:
        return
    groups, few = readers + 1, 40 if readers < 4 else 24
    many = (512 // groups // 8 * 8 * groups - few) // readers // 8 * 8
    if fetching:
        plgpu.set_max_registers(few, action="decrease")
    else:
        plgpu.set_max_registers(many, action="increase")


def tile(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory [...,rows,H], its bytes in the order that both TMA and wgmma know."""
    size = jnp.dtype(dtype).itemsize
    line = 64 if shape[-1] * size % 128 else 128  # bytes of a row that stay together
    order = (plgpu.TilingTransform((8, line // size)), plgpu.SwizzleTransform(line))
    return plgpu.SMEM(shape, dtype, transforms=order)


def ring(stages: int, keys: int, head_dim: int, readers: int, *, int8: bool = False) -> Ring:
    """Scratch memory of a ring."""
    buffer = tile(stages, keys, head_dim, dtype=jnp.int8 if int8 else jnp.bfloat16)
    scale = plgpu.SMEM((stages, keys), jnp.float32) if int8 else None
    ready = plgpu.Barrier(num_barriers=stages, num_arrivals=2 if int8 else 1)
    free = plgpu.Barrier(num_barriers=stages, num_arrivals=readers)
    wide = tile(keys, head_dim) if int8 else None
    return Ring(KV(buffer, buffer, scale, scale), wide, ready, ready, free, free, plgpu.Barrier())


def fetch(ring: Ring, first: Any, last: Any, cache: KV, at: Callable[[Any], Any]) -> None:
    """Bring blocks first..last-1 of the cache's refs, each found by its index `at`, to the ring."""
    stages = ring.kv.k.shape[0]
    count = last - first

    @pl.loop(0, count)
    def _(i: jax.Array) -> None:
        slot = lax.rem(i, stages)
        here = at(first + i)
        for names, ready, free in (
            (("k", "k_scale"), ring.k_ready, ring.k_free),
            (("v", "v_scale"), ring.v_ready, ring.v_free),
        ):
            pl.when(i >= stages)(partial(plgpu.barrier_wait, free.at[slot]))
            for name in names:
                source, to = getattr(cache, name), getattr(ring.kv, name)
                if source is not None:
                    plgpu.copy_gmem_to_smem(source.at[here], to.at[slot], ready.at[slot])

    @pl.loop(jnp.maximum(count - stages, 0), count)
    def _(i: jax.Array) -> None:
        plgpu.barrier_wait(ring.k_free.at[lax.rem(i, stages)])
        plgpu.barrier_wait(ring.v_free.at[lax.rem(i, stages)])


def attend(
    q: Any,
    ring: Ring,
    span: Span,
    *,
    seen_first: Any,
    held: Any,
    visible: Callable[[jax.Array], jax.Array],
    cleaner: Any,
    scale: float,
    window: int | None,
    softcap: float | None,
    take_turns: Callable[[], None] = lambda: None,
) -> Sums:
    """Walk over the blocks of a span as `fetch` brings them.

    Args:
      q: ref [ROWS,H] in shared memory.
      ring, span: the same for every reader of the program.
      seen_first: position of the first key that any query of the program sees.
      held: how many positions hold a token.
      visible: which keys [ROWS,keys] each query sees, by position; not asked where it sees all.
      cleaner: true for one reader.
      scale, window, softcap: as of the ops.
      take_turns: comes back when the other reader has called it too.
    """
    stages, keys, head_dim = ring.kv.k.shape
    int8 = ring.wide is not None

    def step(i: jax.Array, sums: Sums, masked: bool) -> Sums:
        slot = lax.rem(i - span.first, stages)
        k, v = ring.kv.k.at[slot], ring.kv.v.at[slot]
        plgpu.barrier_wait(ring.k_ready.at[slot])
        score = scores(q, widened(k, ring.wide) if int8 else k, take_turns)
        if int8:
            score *= down(ring.kv.k_scale[slot], score)
        plgpu.barrier_arrive(ring.k_free.at[slot])
        score, factor = capped(score, scale, softcap)
        if masked:
            seen = visible(i * keys + lax.broadcasted_iota(jnp.int32, score.shape, 1))
            score = jnp.where(seen, score, -jnp.inf)
        weight, sums = absorb(score, factor, sums)
        if not int8:
            # To the tensor cores in one piece, when the other reader's products are done.
            sums, weight = lax.optimization_barrier((sums, weight.astype(jnp.bfloat16)))
        plgpu.barrier_wait(ring.v_ready.at[slot])
        if int8:
            weight *= down(ring.kv.v_scale[slot], weight)
            if masked:  # a slot without a token may have any scale, and 0 * NaN is NaN
                weight = jnp.where(seen, weight, 0.0)
            v, weight = widened(v, ring.wide), weight.astype(jnp.bfloat16)
        elif masked:

            @pl.when(((i + 1) * keys > held) | (i * keys < seen_first))
            def _() -> None:
                @pl.when(cleaner)
                def _() -> None:
                    zero_rows(v, seen_first - i * keys, held - i * keys)
                    plgpu.barrier_arrive(ring.zeroed)

                plgpu.barrier_wait(ring.zeroed)

        take_turns()
        acc = add_values(sums.acc, weight, v)
        plgpu.barrier_arrive(ring.v_free.at[slot])
        return sums._replace(acc=acc)

    sums = Sums(
        jnp.zeros((ROWS, head_dim), jnp.float32),
        jnp.full((ROWS,), LOWEST, jnp.float32),
        jnp.zeros((ROWS,), jnp.float32),
    )
    if window is not None:
        sums = lax.fori_loop(span.first, span.low, partial(step, masked=True), sums)
    sums = lax.fori_loop(span.low, span.high, partial(step, masked=False), sums)
    return lax.fori_loop(span.high, span.last, partial(step, masked=True), sums)


def across(rows: jax.Array, like: Any) -> jax.Array:
    """[ROWS] as [ROWS,n], the shape of `like`."""
    return lax.broadcast_in_dim(rows, like.shape, [0])


def down(columns: jax.Array, like: Any) -> jax.Array:
    """[n] as [ROWS,n], the shape of `like`."""
    return lax.broadcast_in_dim(columns, like.shape, [1])


def widened(numbers: Any, wide: Any) -> Any:
    """The ref `wide` [keys,H] bfloat16, filled from the ref `numbers` [keys,H] int8."""
    keys, head_dim = numbers.shape
    columns = 64 if head_dim % 128 else 128
    for at, left in itertools.product(range(0, keys, ROWS), range(0, head_dim, columns)):
        part = (pl.ds(at, ROWS), pl.ds(left, columns))
        wide[part] = numbers[part].astype(jnp.bfloat16)
    plgpu.commit_smem()
    return wide


def scores(q: Any, k: Any, meanwhile: Callable[[], None]) -> jax.Array:
    """[ROWS,keys] float32, q.k of refs q [ROWS,H] and k [keys,H] in shared memory."""

    def product(acc: Any) -> Any:
        plgpu.wgmma(acc, q, k.transpose((1, 0)))
        meanwhile()
        return acc[...]  # waits for the product

    return pl.run_scoped(product, plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32))


def add_values(acc: jax.Array, weight: jax.Array, v: Any) -> jax.Array:
    """acc [ROWS,H] float32 + weight [ROWS,keys] bfloat16 times the ref v [keys,H]."""
    return pl.run_state(lambda ref: plgpu.wgmma(ref, weight, v))(plgpu.ACC.init(acc))


def capped(score: jax.Array, scale: float, softcap: float | None) -> tuple[jax.Array, float]:
    """Scores of bare products q.k, and what is left to multiply them with to get log2 of weights.

    tanh is written with exp2: the hardware's own tanh is good for 11 bits only.
    """
    if softcap is None:
        return score, scale * LOG2E
    grown = jnp.exp2(score * (2 * scale * LOG2E / softcap))
    return softcap - 2 * softcap / (1 + grown), LOG2E


def absorb(score: jax.Array, factor: float, sums: Sums) -> tuple[jax.Array, Sums]:
    """The weights [ROWS,keys] of a block's `score * factor`, and the sums; their acc only faded."""
    top = jnp.maximum(sums.top, jnp.max(score, axis=1) * factor)
    fade = jnp.exp2(sums.top - top)
    weight = jnp.exp2(score * factor - across(top, score))
    acc = sums.acc * across(fade, sums.acc)
    return weight, Sums(acc, top, sums.total * fade + jnp.sum(weight, axis=1))


def mean(sums: Sums) -> jax.Array:
    """[ROWS,H] float32: the attention of queries that have seen all their keys; 0 of no keys."""
    share = 1 / jnp.where(sums.total == 0.0, 1.0, sums.total)
    return sums.acc * across(share, sums.acc)


def zero_rows(v: Any, first: jax.Array, last: jax.Array) -> None:
    """Zero all rows of a ref [keys,H] in shared memory but first..last-1.

    Slots that no query sees may hold anything, and 0 * NaN is NaN.
    """
    for at, left in itertools.product(*(range(0, size, ROWS) for size in v.shape)):
        part = v.at[pl.ds(at, ROWS), pl.ds(left, ROWS)]  # few registers at a time
        row = at + lax.iota(jnp.int32, ROWS)
        kept = (across(row, part) >= first) & (across(row, part) < last)
        part[...] = jnp.where(kept, part[...], 0)
    plgpu.commit_smem()
