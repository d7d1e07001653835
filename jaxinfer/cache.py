"""`KVCache`: what attention remembers, one pytree with a length a row.

Row b holds `lengths[b]` tokens. A layer with S slots keeps position p in slot p mod S, so a slot
holds the latest of its positions below the length; what is older has been written over. A layer
without a window has room for every token and never wraps around. A layer with a window needs only
the last of them, so it is a ring of window + MAX_BLOCK slots however long the text: a forward
writes at most MAX_BLOCK tokens before they may be refused, so after any `rewind` the window is
still whole. Ragged batches, refused drafts and idle rows are nothing but `lengths`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.attend import STORED, XLA, Kernels, Store
from jaxinfer.config import LayerConfig, ModelConfig
from jaxinfer.sharding import Layout

TILE = 128  # slots that kernels take at a time: a ring has a multiple of it
SCALE = jnp.dtype(jnp.float32)
MAX_BLOCK = 512  # T, most tokens a row that one forward may feed where a layer has a window


class LayerCache(NamedTuple):
    """Keys (already rotated) and values of one layer."""

    k: jax.Array  # [B,K,S,H] in the model's dtype, or in eight bits
    v: jax.Array  # [B,K,S,H]
    k_scale: jax.Array | None = None  # [B,K,S] f32 where they are in eight bits
    v_scale: jax.Array | None = None

    @property
    def held(self) -> tuple[jax.Array, ...]:
        """The arrays that are there."""
        return tuple(x for x in self if x is not None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of every layer; an argument and a result of the forward."""

    # L of them: separate leaves, since a stacked one would be copied.
    layers: tuple[LayerCache, ...]
    lengths: jax.Array  # [B] int32, tokens held
    kernels: Kernels = dataclasses.field(default=XLA, metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for x in jax.tree.leaves(self.layers))

    def after(self, layers: Sequence[LayerCache], num_new: jax.Array) -> KVCache:
        """The cache once each layer has taken num_new[b] tokens of row b."""
        return dataclasses.replace(self, layers=tuple(layers), lengths=self.lengths + num_new)

    def rewind(self, num: jax.Array) -> KVCache:
        """Forget the last num[b] tokens of row b: a subtraction, never a copy.

        They must be among the last MAX_BLOCK that were written.
        """
        return dataclasses.replace(self, lengths=self.lengths - num)

    def grow(self, config: ModelConfig, capacity: int) -> KVCache:
        """A copy with room for `capacity` tokens a row. A ring that is full stays as it is."""

        def pad(x: jax.Array, layer: LayerConfig) -> jax.Array:
            extra = layer_slots(layer, capacity) - x.shape[2]
            return jnp.pad(x, [(0, 0), (0, 0), (0, extra), (0, 0)][: x.ndim])

        layers = tuple(
            LayerCache(*(pad(x, layer) for x in kv.held))
            for kv, layer in zip(self.layers, config.layers, strict=True)
        )
        return dataclasses.replace(self, layers=layers)


def shardings(tree: Any, layout: Layout) -> Any:
    """How the state of a batch lies, leaf by leaf: caches as their own layout says, everything else
    whole on every device, where each does the same small work on it."""
    whole: Any = layout.sharding()

    def lay(x: Any) -> Any:
        if not isinstance(x, KVCache):
            return whole
        cut = x.kernels.layout.sharding
        layers: Any = jax.tree.map(lambda part: cut("BKSH"[: part.ndim]), x.layers)
        return KVCache(layers, whole, x.kernels)

    return jax.tree.map(lay, tree, is_leaf=lambda x: isinstance(x, KVCache))


def pin(tree: Any, layout: Layout) -> Any:
    """`tree`, inside a jitted step, laid as `shardings` says: a result lies as the argument did."""
    if layout.mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(tree, layout))


def layer_slots(layer: LayerConfig, capacity: int) -> int:
    """S, slots of a layer in a cache for so many tokens."""
    if layer.window is None:
        return capacity
    return min(capacity, -(-(layer.window + MAX_BLOCK) // TILE) * TILE)


def cache_shapes(config: ModelConfig, batch: int, capacity: int) -> list[tuple[int, int, int, int]]:
    """Shape [B,K,S,H] of each layer's keys."""
    return [
        (batch, config.num_kv_heads, layer_slots(layer, capacity), config.head_dim)
        for layer in config.layers
    ]


def cache_bytes(
    config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype, store: Store | None = None
) -> int:
    """Bytes of keys and values of all layers, and of their scales."""
    shapes = cache_shapes(config, batch, capacity)
    return stored_bytes(2 * sum(map(math.prod, shapes)), config.head_dim, dtype, store)


def stored_bytes(numbers: int, head_dim: int, dtype: jnp.dtype, store: Store | None) -> int:
    """Bytes of so many numbers of keys and values, and of a scale for each head of them."""
    if store is None:
        return numbers * jnp.dtype(dtype).itemsize
    return numbers + numbers // head_dim * SCALE.itemsize


def init_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    kernels: Kernels = XLA,
) -> KVCache:
    """An empty cache. Zeros, not uninitialised memory: a masked NaN times zero is still NaN."""
    kind = STORED[kernels.store] or dtype

    def zeros(shape: tuple[int, ...], kind: Any) -> jax.Array:  # one buffer each: donating one
        layout = kernels.layout  # twice fails
        where = layout.sharding("BKSH"[: len(shape)]) if layout.mesh else None
        return jnp.zeros(shape, kind, device=where)

    def layer(shape: tuple[int, int, int, int]) -> LayerCache:
        kv = zeros(shape, kind), zeros(shape, kind)
        if kernels.store is None:
            return LayerCache(*kv)
        return LayerCache(*kv, zeros(shape[:3], SCALE), zeros(shape[:3], SCALE))

    layers = tuple(map(layer, cache_shapes(config, batch, capacity)))
    return KVCache(layers, jnp.zeros((batch,), jnp.int32), kernels)
