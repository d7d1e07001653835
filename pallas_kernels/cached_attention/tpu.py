"""`cached_attention` on TPU: one query block a row, so that T queries read the cache once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import flash, flash_tpu
from pallas_kernels.chips import Blocks, TpuBlocks, tpu_blocks
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.flash_tpu import Operands, Tiling, Tree

MAX_TOKENS = 32


def cached_attention_tpu(
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
    tokens, groups = q.shape[1], q.shape[2] // k_cache.shape[1]
    if tokens > MAX_TOKENS:
        raise UnsupportedError(
            f"q {q.shape}: pallas_tpu takes T of 1 to {MAX_TOKENS}; `attention` takes more"
        )
    check_dtypes(q, k_cache, k_scale)
    tiling = cut(q.shape, k_cache, block_table, window, tpu_blocks(blocks))
    tree = None if ancestors is None else tree_of(ancestors, groups, window)
    x = Operands(
        token=jnp.asarray(np.repeat(np.arange(tokens, dtype=np.int32), groups)[:, None]),
        tree=tree,
        q=flash.fold(q, k_cache.shape[1]),
        k=flash_tpu.as_tiled(k_cache, tiling),
        v=flash_tpu.as_tiled(v_cache, tiling),
        k_scale=k_scale,
        v_scale=v_scale,
    )
    out = flash_tpu.flash(
        start, num_new, block_table, x, tiling=tiling, scale=scale, window=window, softcap=softcap
    )
    return flash.unfold(out, tokens)


def check_dtypes(q: jax.Array, k: jax.Array, k_scale: jax.Array | None) -> None:
    """Refuse what the kernel does not cover."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(f"q is {q.dtype}: pallas_tpu takes bfloat16 and float32")
    if k.dtype != (q.dtype if k_scale is None else jnp.int8):
        raise UnsupportedError(
            f"the cache is {k.dtype}: pallas_tpu takes q's {q.dtype}, or int8 with scales"
        )
    if not 64 <= q.shape[3] <= 256 or q.shape[3] % 64:
        raise UnsupportedError(f"H={q.shape[3]}: pallas_tpu takes 64, 128, 192 and 256")


def cut(
    q: tuple[int, ...],
    k_cache: jax.Array,
    block_table: jax.Array | None,
    window: int | None,
    blocks: TpuBlocks,
) -> Tiling:
    """The tiling of a call; q is its shape [B,T,N,H]."""
    num_kv, slots, head_dim = k_cache.shape[1:]
    heads = 8 if num_kv > 8 and num_kv % 8 == 0 else num_kv
    if block_table is None:
        target = blocks.kv_bytes // (heads * head_dim * k_cache.dtype.itemsize)
        keys = flash_tpu.key_block(slots, target, window)
        count = slots // keys
    else:
        keys, count = slots, block_table.shape[1]
        if keys % 32:
            raise UnsupportedError(f"pages of {keys} slots: pallas_tpu needs a multiple of 32")
    steps = flash.steps_for(q[1], count, keys, window)
    # Splitting pays where one chip's cores would else idle, and only then.
    splits = min(steps, -(-blocks.cores // (q[0] * (num_kv // heads))))
    lanes = flash_tpu.slots_along_lanes(head_dim)
    return Tiling(heads, q[1], keys, count, -(-steps // splits), splits, lanes)


def cache_bytes(
    q: jax.Array,  # [B,T,N,H], or its shape and dtype, as are the others
    k_cache: jax.Array,
    start: jax.Array,  # [B] int32, itself
    num_new: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    block_table: jax.Array | None = None,
    window: int | None = None,
    blocks: Blocks | None = None,
) -> int:
    """Bytes of keys, values and scales that a call copies from the cache."""
    tiling = cut(q.shape, k_cache, block_table, window, tpu_blocks(blocks))
    programs = (k_cache.shape[1] // tiling.heads, 1)
    fetched = flash_tpu.blocks_fetched(start, num_new, programs, tiling, window)
    slot = k_cache.shape[3] * k_cache.dtype.itemsize + (0 if k_scale is None else 4)
    return 2 * fetched * tiling.heads * tiling.keys * slot


def tree_of(ancestors: jax.Array, groups: int, window: int | None) -> Tree:
    """The tree of [T,T] ancestors, a row a query head; the window counts along the branches."""
    depth = jnp.sum(ancestors, axis=1, dtype=jnp.int32) - 1  # [T]
    if window is not None:
        ancestors &= depth[None, :] > depth[:, None] - window
    return Tree(
        jnp.repeat(depth, groups)[:, None],
        jnp.repeat(ancestors.astype(jnp.float32), groups, axis=0),
    )
