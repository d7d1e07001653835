"""Shapes of `attention`: a prompt of 2,048 tokens, and 512 more behind 7,680."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import oracle
from pallas_kernels.attention.api import attention
from pallas_kernels.case import MODELS, Args, Case, Model
from pallas_kernels.chips import Blocks
from pallas_kernels.dispatch import Impl


def cases() -> list[Case]:
    """All of them."""
    out = []
    for name, model in MODELS.items():
        out.append(_case(f"{name}, 2k", model, tokens=2048, slots=2048))
        out.append(_case(f"{name}, 512 of 8k", model, tokens=512, slots=8192))
        if model.window:
            ring = model.window + 512
            out.append(_case(f"{name}, window", model, tokens=512, slots=ring, window=model.window))
    out.append(_case("llama-3-8b, 8k", MODELS["llama-3-8b"], tokens=8192, slots=8192))
    out.append(
        _case("gemma-2 like softcap", MODELS["gemma-3-27b"], tokens=2048, slots=2048, softcap=50.0)
    )
    out.append(_case("smollm2-135m, float32", MODELS["smollm2-135m"], 2048, 2048, dtype="float32"))
    return out


def _case(
    name: str,
    model: Model,
    tokens: int,
    slots: int,
    window: int | None = None,
    softcap: float | None = None,
    dtype: str = "bfloat16",
) -> Case:
    options: dict[str, Any] = {"scale": model.head_dim**-0.5, "softcap": softcap}

    def draw(key: jax.Array, small: bool) -> Args:
        new, held = (70, 256) if small else (tokens, slots)
        keys = jax.random.split(key, 3)
        shape = (1, model.kv, held, model.head_dim)
        args = {
            "q": jax.random.normal(keys[0], (1, new, model.heads, model.head_dim), dtype),
            "k": jax.random.normal(keys[1], shape, dtype),
            "v": jax.random.normal(keys[2], shape, dtype),
        }
        start = 1000 if small and window else 60 if small else slots - tokens
        return args | {"start": jnp.array([start], jnp.int32)}

    def limit(args: Args) -> int | None:
        return None if window is None else min(window, 100) if args["k"].shape[2] == 256 else window

    def run(args: Args, impl: Impl, blocks: Blocks | None) -> jax.Array:
        return attention(**args, window=limit(args), impl=impl, blocks=blocks, **options)

    def expected(args: Args) -> np.ndarray:
        new = np.array([args["q"].shape[1]])
        return oracle.attention(**args, num_new=new, window=limit(args), **options)

    size = jnp.dtype(dtype).itemsize * model.head_dim
    return Case(
        "attention",
        name,
        draw,
        run,
        expected,
        bound=1e-5 if dtype == "float32" else 1e-2,
        covered=("pallas_tpu", "pallas_gpu") if dtype == "bfloat16" else ("pallas_tpu",),
        nbytes=size * (2 * tokens * model.heads + 2 * slots * model.kv),
    )
