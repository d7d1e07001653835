"""How XLA runs a computation, where it would choose badly. Nothing here changes a result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

T = TypeVar("T")  # a pytree of arrays


def outlined(function: Callable[..., jax.Array], *args: object) -> jax.Array:
    """function(*args), one array, as a call that XLA does not inline, so that it fuses nothing
    across it.

    What is set on a value is set on the operation that it comes from, here the call.
    """
    return set_xla_metadata(jax.jit(function)(*args), inlineable="false")


def once(x: jax.Array) -> jax.Array:
    """x, of any shape and dtype, which a CPU computes by itself: neither again for each reader, nor
    in one with what reads it.

    XLA:CPU fuses what it takes for cheap into each reader, and with it all that went before; it
    drops `jax.lax.optimization_barrier` before it does so (jax 0.10.2). Elsewhere nothing is said.
    """
    return jax.lax.platform_dependent(x, cpu=partial(outlined, _same), default=_same)


def _same(x: jax.Array) -> jax.Array:
    return x


def only_if(condition: jax.Array, step: Callable[[T], T], carry: T) -> T:
    """`step(carry)` if the condition [] holds, else `carry`; no reverse-mode gradient.

    A loop of one turn at most: XLA updates what goes round a loop where it lies, but XLA:CPU has
    been seen to copy what passes a branch, a cache as well as the scores of a batch.

    Raises TypeError where `step` changes the structure, a shape or a dtype.
    """
    _, carry = jax.lax.while_loop(
        lambda x: x[0], lambda x: (jnp.zeros_like(x[0]), step(x[1])), (condition, carry)
    )
    return carry
