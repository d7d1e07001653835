"""Shapes of `cache_update`: 1, 8 and 512 new tokens a row, in caches of 8,192 slots."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cache_update.api import cache_update
from pallas_kernels.case import MODELS, Args, Case, Model
from pallas_kernels.chips import Blocks
from pallas_kernels.dispatch import Impl

BATCH, CONTEXT = 8, 8192


def cases() -> list[Case]:
    """All of them."""
    out = [_case(f"{name}, T={t}", model, t) for name, model in MODELS.items() for t in (1, 8, 512)]
    for name in ("llama-3-8b", "smollm2-135m"):
        out.append(_case(f"{name}, int8, T=8", MODELS[name], 8, int8=True))
    return out


def _case(name: str, model: Model, tokens: int, int8: bool = False) -> Case:
    def draw(key: jax.Array, small: bool) -> Args:
        rows, slots, new = (2, 256, min(tokens, 140)) if small else (BATCH, CONTEXT, tokens)
        shapes: list[Any] = [(model.kv, model.head_dim)] * 2
        kinds: list[Any] = [jnp.int8 if int8 else jnp.bfloat16] * 2
        if int8:
            shapes, kinds = shapes + [(model.kv,)] * 2, kinds + [jnp.float32] * 2

        def numbers(n: int, shape: tuple[int, ...], kind: Any) -> jax.Array:
            key_n = jax.random.fold_in(key, n)
            return jax.random.randint(key_n, shape, -127, 128).astype(kind)

        both = list(enumerate(zip(shapes, kinds, strict=True)))
        start = [100, 250] if small else [CONTEXT // 2 + 3] * rows
        return {
            "caches": tuple(numbers(n, (rows, s[0], slots, *s[1:]), kind) for n, (s, kind) in both),
            "new": tuple(numbers(9 + n, (rows, new, *s), kind) for n, (s, kind) in both),
            "start": jnp.array(start, jnp.int32),
            "num_new": jnp.array([new, new // 2 + 1][:rows] if small else [new] * rows, jnp.int32),
        }

    def run(args: Args, impl: Impl, blocks: Blocks | None) -> Any:
        return cache_update(**args, impl=impl)

    def expected(args: Args) -> Any:
        caches = [np.array(x, np.float64) for x in args["caches"]]
        for b, t in np.argwhere(np.arange(args["new"][0].shape[1]) < args["num_new"][:, None]):
            for cache, x in zip(caches, args["new"], strict=True):
                cache[b, :, (args["start"][b] + t) % cache.shape[2]] = x[b, t]
        return tuple(caches)

    size = model.head_dim + 4 if int8 else 2 * model.head_dim
    return Case(
        "cache_update",
        name,
        draw,
        run,
        expected,
        bound=0.0,  # it moves numbers and changes none
        nbytes=2 * 2 * BATCH * tokens * model.kv * size,
        donated=("caches",),
        covered=("pallas_tpu",),
    )
