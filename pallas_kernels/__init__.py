"""Attention kernels for JAX. Imports jax only; each op is a folder: api, reference, one file a backend."""

from pallas_kernels.cached_attention.api import UnsupportedError, cached_attention

__all__ = ["UnsupportedError", "cached_attention"]
