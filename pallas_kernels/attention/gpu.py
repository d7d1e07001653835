"""`attention` on NVIDIA's Hopper: programs of 128 queries of one head, over the keys they see."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import flash_gpu
from pallas_kernels.chips import Blocks, gpu_blocks
from pallas_kernels.flash_gpu import KV, ROWS, Ring

READERS = 2  # while one is at its softmax, the other multiplies
STAGES = 2
TILE = READERS * ROWS  # query tokens a program


def attention_gpu(
    q: jax.Array,  # [B,T,N,H]
    k: jax.Array,  # [B,K,S,H]
    v: jax.Array,
    start: jax.Array,  # [B] int32
    num_new: jax.Array,  # [B] int32
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    blocks: Blocks | None,
) -> jax.Array:  # [B,T,N,H]
    """See `attention`."""
    flash_gpu.check(q, k, scale)
    batch, tokens, num_heads, head_dim = q.shape
    num_kv, slots = k.shape[1:3]
    target = (gpu_blocks(blocks)).prefill_keys
    keys = flash_gpu.key_block(slots, target if head_dim <= 128 else target // 2)
    q = jnp.pad(q, [(0, 0), (0, -tokens % TILE), (0, 0), (0, 0)])
    tiles = q.shape[1] // TILE

    def kernel(
        start_ref: Any,
        num_ref: Any,
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        out_ref: Any,
        *,
        ring: Ring,
        q_tile: Any,
        q_ready: Any,
        turn: Any,
    ) -> None:
        head, b, group = lax.axis_index("head"), lax.axis_index("b"), lax.axis_index("group")
        start, num_new = start_ref[b], num_ref[b]
        # The last queries see the most keys: first come the programs that take longest.
        begin = (tiles - 1 - lax.axis_index("tile")) * TILE
        end = jnp.minimum(begin + TILE, num_new)
        span = flash_gpu.span(start, begin, end, keys=keys, window=window)

        def take_turns() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(group < READERS)
        def _() -> None:
            flash_gpu.take_registers(READERS, fetching=False)
            row = begin + group * ROWS
            mine, here = q_tile.at[group], (b, pl.ds(row, ROWS), head)
            plgpu.copy_gmem_to_smem(q_ref.at[here], mine, q_ready.at[group])

            def visible(key: jax.Array) -> jax.Array:
                query = start + row + lax.iota(jnp.int32, ROWS)
                seen = key < flash_gpu.across(jnp.minimum(query + 1, start + num_new), key)
                return (
                    seen if window is None else seen & (key > flash_gpu.across(query - window, key))
                )

            plgpu.barrier_wait(q_ready.at[group])
            pl.when(group == 1)(take_turns)  # from here on, half a step behind
            sums = flash_gpu.attend(
                mine,
                ring,
                span,
                seen_first=0 if window is None else start + begin - window + 1,
                held=start + num_new,
                visible=visible,
                cleaner=group == 0,
                scale=scale,
                window=window,
                softcap=softcap,
                take_turns=take_turns,
            )
            pl.when(group == 0)(take_turns)
            mine[...] = flash_gpu.mean(sums).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out_ref.at[here])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the memory outlives the copies

        @pl.when(group == READERS)
        def _() -> None:
            flash_gpu.take_registers(READERS, fetching=True)
            kv_head = lax.div(head, num_heads // num_kv)

            def at(block: jax.Array) -> tuple[Any, ...]:
                return b, kv_head, pl.ds(lax.rem(block, slots // keys) * keys, keys)

            flash_gpu.fetch(ring, span.first, span.last, KV(k_ref, v_ref, None, None), at)

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(num_heads, batch, tiles),
        grid_names=("head", "b", "tile"),
        num_threads=READERS + 1,
        thread_name="group",
        scratch_types={
            "ring": flash_gpu.ring(STAGES, keys, head_dim, READERS),
            "q_tile": flash_gpu.tile(READERS, ROWS, head_dim),
            "q_ready": plgpu.Barrier(num_barriers=READERS),
            "turn": plgpu.Barrier(num_arrivals=READERS),
        },
        compiler_params=flash_gpu.PARAMS,
    )(start, num_new, q, k, v)
    return out[:, :tokens]
