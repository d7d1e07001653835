"""Attention kernels for JAX. Imports jax only; an op is a folder: api, reference, backends."""

from pallas_kernels.attention.api import attention
from pallas_kernels.cache_update.api import cache_update
from pallas_kernels.cached_attention.api import cached_attention
from pallas_kernels.dispatch import Impl, UnsupportedError
from pallas_kernels.matmul.api import matmul

__all__ = ["Impl", "UnsupportedError", "attention", "cache_update", "cached_attention", "matmul"]
