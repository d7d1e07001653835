"""Named real shapes: what tests, the self-check and benchmarks run every kernel at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pallas_kernels.chips import Blocks
from pallas_kernels.dispatch import Impl

Args = dict[str, Any]  # arrays, or their shapes


class Model(NamedTuple):
    """Sizes of a published model."""

    heads: int  # N
    kv: int  # K
    head_dim: int  # H
    width: int  # D
    hidden: int  # F
    window: int | None = None  # of its local layers


MODELS = {
    "llama-3-8b": Model(32, 8, 128, 4096, 14336),
    "llama-3-70b": Model(64, 8, 128, 8192, 28672),
    "qwen3-8b": Model(32, 8, 128, 4096, 12288),
    "gemma-3-270m": Model(4, 1, 256, 640, 2048, window=512),
    "gemma-3-27b": Model(32, 16, 128, 5376, 21504, window=1024),
    "smollm2-135m": Model(9, 3, 64, 576, 1536),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: str
    name: str
    draw: Callable[[jax.Array, bool], Args]  # (key, small): random arguments; small: to interpret
    run: Callable[[Args, Impl, Blocks | None], Any]
    oracle: Callable[[Args], Any]  # float64 results of NumPy arguments
    bound: float  # of the error relative to the greatest number
    nbytes: int  # that must be read and written at the real shape
    donated: tuple[str, ...] = ()  # arguments that the results replace
    covered: tuple[Impl, ...] = ("pallas_tpu", "pallas_gpu")  # by these; others may refuse
    cache_bytes: Callable[[Blocks], int] | None = None  # copied from a full cache on a TPU

    def shapes(self) -> Args:
        """The arguments' shapes and dtypes; nothing is drawn."""
        shapes: Args = jax.eval_shape(lambda: self.draw(jax.random.key(0), False))
        return shapes


def size_of(tree: Any) -> int:
    """Bytes of all arrays or shapes of a pytree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
