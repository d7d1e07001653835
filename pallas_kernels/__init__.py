"""Attention kernels for JAX. Imports jax only; an op is a folder: api, reference, backends."""

from pallas_kernels.cached_attention.api import UnsupportedError, cached_attention

__all__ = ["UnsupportedError", "cached_attention"]
