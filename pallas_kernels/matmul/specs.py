"""Shapes of `matmul`: the projections of published models, for 8 and 64 rows."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import oracle
from pallas_kernels.case import MODELS, Args, Case, Model
from pallas_kernels.chips import Blocks
from pallas_kernels.dispatch import Impl
from pallas_kernels.matmul.api import matmul

SCHEMES = {"int8": (8, None), "int4 in groups of 32": (4, 32), "int4 in groups of 128": (4, 128)}


def cases() -> list[Case]:
    """All of them."""
    out = []
    for name, model in MODELS.items():
        for part, (inputs, outputs) in _projections(model):
            for scheme, (bits, group) in SCHEMES.items():
                if group is None or inputs % group == 0:
                    label = f"{name} {part}, {scheme}"
                    out.append(_case(f"{label}, 8 rows", 8, inputs, outputs, bits, group))
    model = MODELS["llama-3-8b"]
    for scheme, (bits, group) in SCHEMES.items():
        label = f"llama-3-8b up, {scheme}"
        for rows in (64, 1024):
            out.append(_case(f"{label}, {rows} rows", rows, model.width, model.hidden, bits, group))
    return out


def _projections(model: Model) -> Iterator[tuple[str, tuple[int, int]]]:
    yield "q", (model.width, model.heads * model.head_dim)
    yield "k", (model.width, model.kv * model.head_dim)
    yield "up", (model.width, model.hidden)
    yield "down", (model.hidden, model.width)


def _case(name: str, rows: int, inputs: int, outputs: int, bits: int, group: int | None) -> Case:
    def draw(key: jax.Array, small: bool) -> Args:
        keys = jax.random.split(key, 3)
        # Interpreted: as many inputs, since they are what is cut and grouped, and fewer outputs.
        columns = min(outputs, 256) if small else outputs
        shape, kind = ((inputs, columns), jnp.int8) if bits == 8 else (
            (inputs // 2, columns), jnp.uint8
        )  # fmt: skip
        low, high = (-127, 128) if bits == 8 else (0, 256)
        groups = 1 if group is None else inputs // group
        return {
            "x": jax.random.normal(keys[0], (min(rows, 16) if small else rows, inputs), "bfloat16"),
            "w": jax.random.randint(keys[1], shape, low, high, jnp.int32).astype(kind),
            "scale": jax.random.uniform(keys[2], (groups, columns), minval=0.5, maxval=1.5),
        }

    def run(args: Args, impl: Impl, blocks: Blocks | None) -> jax.Array:
        return matmul(**args, impl=impl, blocks=blocks)

    def expected(args: Args) -> np.ndarray:
        w = args["w"]
        if bits == 4:
            w = np.stack([w & 15, w >> 4], axis=1).reshape(inputs, -1)
            w = (w.astype(np.int64) ^ 8) - 8
        return oracle.matmul(args["x"], w, args["scale"])

    numbers = 2 * rows * (inputs + outputs) + 4 * outputs * (inputs // (group or inputs))
    return Case(
        "matmul",
        name,
        draw,
        run,
        expected,
        bound=1e-2,
        nbytes=numbers + inputs * outputs * bits // 8,
        covered=("pallas_tpu",),
    )
