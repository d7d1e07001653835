"""`cached_attention` on NVIDIA's Hopper: T queries of G heads are rows of one matrix, and read the
keys of their row together. Programs share the keys of a row and a kv head; XLA joins their parts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import flash, flash_gpu
from pallas_kernels.chips import Blocks, gpu_blocks
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.flash_gpu import KV, ROWS, Ring

MAX_TOKENS = 32  # as many as there are bits in a word
SHARED_BYTES = 227 * 1024 - 8 * 1024  # of a program, less what barriers and rows of numbers take


def cached_attention_gpu(
    q: jax.Array,  # [B,T,N,H]
    k_cache: jax.Array,  # [B,K,S,H], or [P,K,page,H]
    v_cache: jax.Array,
    start: jax.Array,  # [B] int32
    num_new: jax.Array,  # [B] int32
    *,
    k_scale: jax.Array | None,  # [B,K,S] float32, or [P,K,page]
    v_scale: jax.Array | None,
    block_table: jax.Array | None,  # [B,pages] int32
    ancestors: jax.Array | None,  # [T,T] bool
    scale: float,
    window: int | None,
    softcap: float | None,
    blocks: Blocks | None,
) -> jax.Array:  # [B,T,N,H]
    """See `cached_attention`; the new keys and values are in the cache already."""
    int8 = k_scale is not None
    flash_gpu.check(q, k_cache, scale, int8=int8)
    batch, tokens, num_heads, head_dim = q.shape
    num_kv, slots = k_cache.shape[1:3]
    rows = tokens * num_heads // num_kv
    readers = -(-rows // ROWS)
    most = 1 if int8 else 4 if head_dim <= 128 else 2  # readers that find enough registers
    if tokens > MAX_TOKENS or readers > most:
        raise UnsupportedError(
            f"q {q.shape}: pallas_gpu takes T up to {MAX_TOKENS}, and T * N / K up to {most * ROWS}"
            f" where H={head_dim} and the cache is {k_cache.dtype}"
        )
    blocks = gpu_blocks(blocks)
    keys = flash_gpu.key_block(slots, blocks.decode_keys)
    per_page = slots // keys
    count = per_page if block_table is None else per_page * block_table.shape[1]
    steps = flash.steps_for(tokens, count, keys, window)
    splits = splits_for(batch * num_kv, steps, blocks.multiprocessors)
    room = SHARED_BYTES - (readers * ROWS + int8 * keys) * head_dim * 2
    stages = min(room // (2 * keys * head_dim * k_cache.dtype.itemsize), 8)
    word_of = row_words(tokens, rows // tokens, ancestors, window)
    padding = readers * ROWS - rows
    folded = jnp.pad(flash.fold(q, num_kv), [(0, 0), (0, 0), (0, padding), (0, 0)])
    used = ROWS if readers > 1 else -(-rows // 8) * 8  # rows of a reader that are worth storing

    def kernel(
        start_ref: Any,
        num_ref: Any,
        table_ref: Any,
        words_ref: Any,
        q_ref: Any,
        cache: KV,
        out_ref: Any,
        weight_ref: Any,
        *,
        ring: Ring,
        q_tile: Any,
        q_ready: Any,
        words: Any,
        words_ready: Any,
        weight: Any,
    ) -> None:
        part, head, b = lax.axis_index("part"), lax.axis_index("head"), lax.axis_index("b")
        group = lax.axis_index("group")
        start, held = start_ref[b], start_ref[b] + num_ref[b]
        span = flash_gpu.span(
            start, 0, num_ref[b], keys=keys, window=window, split=part, splits=splits
        )

        @pl.when(group < readers)
        def _() -> None:
            flash_gpu.take_registers(readers, fetching=False)
            mine, here = q_tile.at[group], pl.ds(group * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[b, head, here], mine, q_ready.at[group])
            plgpu.copy_gmem_to_smem(words_ref.at[group], words.at[group], words_ready.at[group])

            def visible(key: jax.Array) -> jax.Array:
                new = key - start
                word = flash_gpu.across(words[group, 0], key)
                bit = (word >> jnp.clip(new, 0, MAX_TOKENS - 1)) & 1
                seen = (new < 0) | ((bit == 1) & (key < held))
                if window is None:
                    return seen
                depth = flash_gpu.across(words[group, 1], key)
                return seen & ((new >= 0) | (key > start + depth - window))

            plgpu.barrier_wait(q_ready.at[group])
            plgpu.barrier_wait(words_ready.at[group])
            sums = flash_gpu.attend(
                mine,
                ring,
                span,
                seen_first=0 if window is None else start - window + 1,
                held=held,
                visible=visible,
                cleaner=group == 0,
                scale=scale,
                window=window,
                softcap=softcap,
            )
            mine[...] = flash_gpu.mean(sums).astype(jnp.bfloat16)
            weight[group] = sums.top / flash_gpu.LOG2E + jnp.log(sums.total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                mine.at[pl.ds(0, used)], out_ref.at[part, b, head, pl.ds(group * ROWS, used)]
            )
            plgpu.copy_smem_to_gmem(weight.at[group], weight_ref.at[part, b, head, here])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the memory outlives the copies

        @pl.when(group == readers)
        def _() -> None:
            flash_gpu.take_registers(readers, fetching=True)

            def at(block: jax.Array) -> tuple[Any, ...]:
                block = lax.rem(block, count)
                page = b if table_ref is None else table_ref[b, lax.div(block, per_page)]
                return page, head, pl.ds(lax.rem(block, per_page) * keys, keys)

            flash_gpu.fetch(ring, span.first, span.last, cache, at)

    out_shape = (splits, *folded.shape)
    acc, weight = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(out_shape, q.dtype),
            jax.ShapeDtypeStruct(out_shape[:-1], jnp.float32),
        ),
        grid=(splits, num_kv, batch),
        grid_names=("part", "head", "b"),
        num_threads=readers + 1,
        thread_name="group",
        scratch_types={
            "ring": flash_gpu.ring(stages, keys, head_dim, readers, int8=int8),
            "q_tile": flash_gpu.tile(readers, ROWS, head_dim),
            "q_ready": plgpu.Barrier(num_barriers=readers),
            "words": plgpu.SMEM((readers, 2, ROWS), jnp.int32),
            "words_ready": plgpu.Barrier(num_barriers=readers),
            "weight": plgpu.SMEM((readers, ROWS), jnp.float32),
        },
        compiler_params=flash_gpu.PARAMS,
    )(start, num_new, block_table, word_of, folded, KV(k_cache, v_cache, k_scale, v_scale))
    parts = flash.Sums(acc[:, :, :, :rows], weight[:, :, :, :rows, None], 1.0)
    return flash.unfold(flash.join(parts).astype(q.dtype), tokens)


def splits_for(programs: int, steps: int, multiprocessors: int) -> int:
    """Programs that share the keys of a row and a kv head.

    They run in waves of `multiprocessors`. A wave takes as long as its blocks, at most `steps`
    divided by the splits, and about two more for its start and its end.
    """

    def time(splits: int) -> int:
        return -(-programs * splits // multiprocessors) * (-(-steps // splits) + 2)

    return min(range(1, steps + 1), key=time)


def row_words(tokens: int, groups: int, ancestors: jax.Array | None, window: int | None) -> Any:
    """[readers,2,ROWS] int32 of every query row: bits of the new tokens it sees, and its depth."""
    xp: Any = np if ancestors is None else jnp  # of a chain, a constant
    seen = np.tril(np.ones((tokens, tokens), bool)) if ancestors is None else ancestors
    depth = xp.sum(seen, axis=1) - 1  # [T]
    if window is not None:
        seen = seen & (depth[None, :] > depth[:, None] - window)
    bits = xp.sum(xp.where(seen, xp.uint32(1) << xp.arange(tokens, dtype=xp.uint32), 0), axis=1)
    words = xp.stack([bits.astype(xp.uint32).view(xp.int32), depth.astype(xp.int32)])
    words = xp.repeat(words, groups, axis=1)  # [2,R]
    words = xp.pad(words, [(0, 0), (0, -words.shape[1] % ROWS)])
    return xp.swapaxes(words.reshape(2, -1, ROWS), 0, 1)
