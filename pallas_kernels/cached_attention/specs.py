"""Shapes of `cached_attention`: decode and verify over 8,192 and 32,768 tokens of context."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import oracle
from pallas_kernels.cached_attention import tpu
from pallas_kernels.cached_attention.api import cached_attention
from pallas_kernels.case import MODELS, Args, Case, Model
from pallas_kernels.chips import Blocks
from pallas_kernels.dispatch import Impl

BATCH, CONTEXT, RING, PAGE = 8, 8192, 512, 128


def cases() -> list[Case]:
    """All of them."""
    out = []
    for name, model in MODELS.items():
        out += [_case(f"{name}, T={t}", model, tokens=t) for t in (1, 8)]
        if model.window:
            out += [
                _case(f"{name}, window, T={t}", model, tokens=t, window=model.window)
                for t in (1, 8)
            ]
    for name in ("llama-3-8b", "smollm2-135m"):
        make = partial(_case, model=MODELS[name])
        out += [
            make(f"{name}, int8, T=1", tokens=1, int8=True),
            make(f"{name}, int8, T=8", tokens=8, int8=True),
            make(f"{name}, pages, T=8", tokens=8, paged=True),
            make(f"{name}, int8 pages, T=8", tokens=8, int8=True, paged=True),
            make(f"{name}, tree, T=8", tokens=8, tree=True),
        ]
    make = partial(_case, model=MODELS["llama-3-8b"])
    out += [make(f"llama-3-8b, 32k, T={t}", tokens=t, context=32768) for t in (1, 8)]
    out += [
        make("llama-3-8b, T=32", tokens=32),
        make("llama-3-8b, one row, T=1", tokens=1, batch=1),
    ]
    out.append(make("llama-3-8b, float32, T=8", tokens=8, dtype="float32"))
    return out


def _case(
    name: str,
    model: Model,
    *,
    tokens: int,
    batch: int = BATCH,
    context: int = CONTEXT,
    window: int | None = None,
    int8: bool = False,
    paged: bool = False,
    tree: bool = False,
    dtype: str = "bfloat16",
) -> Case:
    options: dict[str, Any] = {"scale": model.head_dim**-0.5}

    def draw(key: jax.Array, small: bool) -> Args:
        rows = min(batch, 2) if small else batch
        slots = 256 if small else window + RING if window else context
        shape = (rows, model.kv, slots, model.head_dim)
        if paged:
            shape = (rows * slots // PAGE, model.kv, PAGE, model.head_dim)
        keys = jax.random.split(key, 5)
        # Full caches on a device; when interpreted, one row ends at a block's edge.
        start = [slots - tokens, 128 - tokens] if small else [slots - tokens] * rows
        args = {
            "q": jax.random.normal(keys[0], (rows, tokens, model.heads, model.head_dim), dtype),
            "start": jnp.array(start[:rows], jnp.int32),
        }
        for n, which in enumerate("kv"):
            if int8:
                args[which] = jax.random.randint(keys[1 + n], shape, -127, 128, jnp.int8)
                scale = jax.random.uniform(keys[3 + n], shape[:3], minval=0.005, maxval=0.02)
                args[f"{which}_scale"] = scale
            else:
                args[which] = jax.random.normal(keys[1 + n], shape, dtype)
        if paged:
            order = jax.random.permutation(keys[0], shape[0])
            args["block_table"] = order.reshape(rows, -1).astype(jnp.int32)
        if tree:  # two branches behind a common token
            row, column = np.indices((tokens, tokens))
            seen = (column == 0) | ((column <= row) & (column % 2 == row % 2))
            args["ancestors"] = jnp.asarray(seen)
        return args

    def limit(args: Args) -> int | None:
        return None if window is None else min(window, 100) if args["k"].shape[2] == 256 else window

    def run(args: Args, impl: Impl, blocks: Blocks | None) -> jax.Array:
        rest = {n: x for n, x in args.items() if n not in ("q", "k", "v", "start")}
        return cached_attention(
            args["q"], None, None, args["k"], args["v"], args["start"],
            window=limit(args), impl=impl, blocks=blocks, **options, **rest,
        )  # fmt: skip

    def expected(args: Args) -> np.ndarray:
        rows, table = len(args["q"]), args.get("block_table")
        k, v = (oracle.dense(args[n], args.get(f"{n}_scale"), table) for n in "kv")
        return oracle.attention(
            args["q"], k, v, args["start"], np.full(rows, tokens),
            window=limit(args), ancestors=args.get("ancestors"), **options,
        )  # fmt: skip

    def cache_bytes(blocks: Blocks) -> int:
        shapes = jax.eval_shape(lambda: draw(jax.random.key(0), False))
        rest = {n: shapes[n] for n in ("k_scale", "block_table") if n in shapes}
        # Of rows at every place within a block: where a window begins decides how many it meets.
        start = context - tokens - jnp.arange(128)
        num_new = jnp.full((128,), tokens)
        q, k = shapes["q"], shapes["k"]
        read = tpu.cache_bytes(q, k, start, num_new, window=window, blocks=blocks, **rest)
        return read * batch // 128

    read = context if window is None else window + tokens - 1
    number = model.head_dim + 4 if int8 else model.head_dim * jnp.dtype(dtype).itemsize
    queries = batch * tokens * model.heads * model.head_dim * jnp.dtype(dtype).itemsize
    return Case(
        "cached_attention",
        name,
        draw,
        run,
        expected,
        bound=1e-5 if dtype == "float32" else 2e-2 if int8 else 1e-2,
        nbytes=2 * batch * model.kv * read * number + 2 * queries,
        covered=("pallas_tpu", "pallas_gpu") if dtype == "bfloat16" else ("pallas_tpu",),
        cache_bytes=cache_bytes,
    )
