"""`KVCache`: what attention remembers, one pytree with a length a row.

Row b holds `lengths[b]` tokens in slots 0 .. lengths[b]-1; slots beyond hold stale numbers that no
mask lets through. So ragged batches, refused drafts (`rewind`) and idle rows are only `lengths`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.config import ModelConfig


class LayerCache(NamedTuple):
    """Keys (already rotated) and values of one layer."""

    k: jax.Array  # [B,K,S,H] in the model's dtype
    v: jax.Array  # [B,K,S,H]

    def append(
        self, k: jax.Array, v: jax.Array, start: jax.Array, num_new: jax.Array
    ) -> LayerCache:
        """Write k, v [B,T,K,H] of row b at slots start[b] ..; only its first num_new[b] tokens."""
        t = jnp.arange(k.shape[1])
        slots = jnp.where(t < num_new[:, None], start[:, None] + t, self.k.shape[2])  # [B,T]
        rows = jnp.arange(k.shape[0])[:, None]
        # Slot S lies outside: those writes are dropped, so padding never touches a live slot.
        return LayerCache(
            self.k.at[rows, :, slots].set(k.astype(self.k.dtype), mode="drop"),
            self.v.at[rows, :, slots].set(v.astype(self.v.dtype), mode="drop"),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of every layer; an argument and a result of the forward."""

    layers: tuple[
        LayerCache, ...
    ]  # L of them: separate leaves, since a stacked one would be copied
    lengths: jax.Array  # [B] int32, tokens held

    @property
    def capacity(self) -> int:
        """S, slots a row."""
        return self.layers[0].k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for x in jax.tree.leaves(self.layers))

    def rewind(self, num: jax.Array) -> KVCache:
        """Forget the last num[b] tokens of row b: a subtraction, never a copy."""
        return dataclasses.replace(self, lengths=self.lengths - num)

    def grow(self, capacity: int) -> KVCache:
        """A copy with room for `capacity` tokens a row."""
        extra = capacity - self.capacity
        pad = [(0, 0), (0, 0), (0, extra), (0, 0)]
        layers = jax.tree.map(lambda x: jnp.pad(x, pad), self.layers)
        return dataclasses.replace(self, layers=layers)


def cache_shape(config: ModelConfig, batch: int, capacity: int) -> tuple[int, int, int, int]:
    """Shape [B,K,S,H] of one layer's keys."""
    return (batch, config.num_kv_heads, capacity, config.head_dim)


def cache_bytes(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> int:
    """Bytes of keys and values of all layers."""
    b, k, s, h = cache_shape(config, batch, capacity)
    return 2 * config.num_layers * b * k * s * h * jnp.dtype(dtype).itemsize


def init_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    sharding: jax.sharding.Sharding | None = None,
) -> KVCache:
    """An empty cache. Zeros, not uninitialised memory: a masked NaN times zero is still NaN."""
    shape = cache_shape(config, batch, capacity)

    def zeros() -> jax.Array:  # one buffer each: the same buffer donated twice is an error
        return jnp.zeros(shape, dtype, device=sharding)

    layers = tuple(LayerCache(zeros(), zeros()) for _ in config.layers)
    return KVCache(layers, jnp.zeros((batch,), jnp.int32))
