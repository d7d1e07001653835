"""Times on an accelerator: medians of runs after a warm-up, many calls a run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.dispatch import Impl

CALLS, RUNS = 20, 7


def median_seconds(step: Callable[[Any], Any], args: Any) -> float:
    """Seconds a call of `step`, which gives back the arguments of the next call."""
    args = jax.block_until_ready(step(args))
    seconds = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            args = step(args)
        jax.block_until_ready(args)
        seconds.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(seconds)


def seconds_of(case: Case, impl: Impl) -> float:
    """Of one call at the real shape; the calls of a run wait in the device's queue."""
    args = jax.jit(lambda key: case.draw(key, False))(jax.random.key(1))
    others = {name: x for name, x in args.items() if name not in case.donated}
    if not case.donated:
        call = jax.jit(lambda a: case.run(a, impl, None))
        return median_seconds(lambda _: call(others), None)
    step = jax.jit(
        lambda gone, kept: dict(
            zip(case.donated, [case.run({**gone, **kept}, impl, None)], strict=True)
        ),
        donate_argnums=0,
    )
    return median_seconds(lambda gone: step(gone, others), {n: args[n] for n in case.donated})


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes/s of reading and writing `size` bytes."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    return 2 * size / median_seconds(add, jnp.zeros((size // 4,), jnp.float32))


def cudnn_seconds(case: Case) -> float:
    """Of cuDNN's attention at a case of `attention` whose queries are all of the keys."""
    args = jax.jit(lambda key: case.draw(key, False))(jax.random.key(1))
    q, k, v = args["q"], *(jnp.swapaxes(args[n], 1, 2) for n in "kv")
    if q.shape[1] != k.shape[1]:
        raise ValueError("cuDNN's causal mask begins at the first key")
    call = jax.jit(
        lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        )
    )
    return median_seconds(lambda _: call(q, k, v), None)
