"""`attention` on TPU: blocks of queries, each over the blocks of keys that it sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import flash, flash_tpu
from pallas_kernels.cached_attention.tpu import check_dtypes
from pallas_kernels.chips import Blocks, TpuBlocks, tpu_blocks
from pallas_kernels.flash_tpu import Operands, Tiling


def attention_tpu(
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
    check_dtypes(q, k, None)
    tokens, groups = q.shape[1], q.shape[2] // k.shape[1]
    tiling = cut(q.shape, k.shape, window, tpu_blocks(blocks))
    padding = -tokens % tiling.tokens
    x = Operands(
        token=jnp.asarray(np.repeat(np.arange(tiling.tokens, dtype=np.int32), groups)[:, None]),
        tree=None,
        q=flash.fold(jnp.pad(q, [(0, 0), (0, padding), (0, 0), (0, 0)]), k.shape[1]),
        k=flash_tpu.as_tiled(k, tiling),
        v=flash_tpu.as_tiled(v, tiling),
        k_scale=None,
        v_scale=None,
    )
    out = flash_tpu.flash(
        start, num_new, None, x, tiling=tiling, scale=scale, window=window, softcap=softcap
    )
    return flash.unfold(out, tokens + padding)[:, :tokens]


def cut(q: tuple[int, ...], k: tuple[int, ...], window: int | None, blocks: TpuBlocks) -> Tiling:
    """The tiling of a call; q and k are shapes [B,T,N,H] and [B,K,S,H]."""
    groups = q[2] // k[1]
    # 16 rows are a tile of bfloat16, so a block of tokens is a multiple of 16.
    tokens = min(max(blocks.query_rows // groups // 16 * 16, 16), -(-q[1] // 16) * 16)
    keys = flash_tpu.key_block(k[2], blocks.prefill_keys, window)
    count = k[2] // keys
    steps = flash.steps_for(tokens, count, keys, window)
    return Tiling(1, tokens, keys, count, steps, 1, flash_tpu.slots_along_lanes(q[3]))
