"""Which backend runs an op: one that is asked for by name never gives way to another."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")
Impl = Literal["auto", "xla", "pallas_tpu", "pallas_gpu"]

# What "auto" tries first, by jax.default_backend(); elsewhere XLA is the best there is.
_NATIVE = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


class UnsupportedError(ValueError):
    """An argument that the chosen backend does not cover; the message says what it covers."""


def run(op: str, impl: Impl, backends: Mapping[str, Callable[[], T]]) -> T:
    """The result of `impl`, one of `backends`; "auto" is the platform's own, else "xla".

    Raises:
      UnsupportedError: an `impl` that the op lacks, or arguments that the one asked for does not
        cover. "auto" logs one line, once a reason, and takes "xla" instead.
    """
    if impl != "auto":
        if impl not in backends:
            raise UnsupportedError(f"impl={impl!r}: {op} has {', '.join(('auto', *backends))}")
        return backends[impl]()
    best = _NATIVE.get(jax.default_backend(), "xla")
    if best not in backends:
        _say_once(f"{op}: no {best}, so xla")
        return backends["xla"]()
    try:
        return backends[best]()
    except UnsupportedError as reason:
        if best == "xla":
            raise
        _say_once(f"{op}: xla instead of {best}: {reason}")
        return backends["xla"]()


def check_integers(**arrays: jax.Array | None) -> None:
    """Refuse indices and lengths that are no integers."""
    for name, given in arrays.items():
        if given is not None and not jnp.issubdtype(given.dtype, jnp.integer):
            raise UnsupportedError(f"{name} is {given.dtype}: it must be an integer type")


@functools.cache
def _say_once(line: str) -> None:
    logging.getLogger("pallas_kernels").warning(line)
