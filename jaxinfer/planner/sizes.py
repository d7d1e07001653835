"""Bytes of a plan, counted from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from jaxinfer import cache, steps
from jaxinfer.attend import Store
from jaxinfer.batch import batch_rows
from jaxinfer.checkpoint.placement import bytes_a_device, param_shapes, schemes_of
from jaxinfer.config import ModelConfig
from jaxinfer.planner.target import Target
from jaxinfer.recipes import Recipe, make_recipe
from jaxinfer.sharding import Layout, Rules, fit_config, make_layout


@dataclasses.dataclass(frozen=True)
class Asked:
    """The arguments of `plan`, checked."""

    model: str
    config: ModelConfig
    small: ModelConfig | None  # the drafter's
    target: Target
    batch: int
    context: int
    quantize: str | None
    dtype: str
    cache_dtype: Store | None
    drafter: str
    num_draft: int
    acceptance: float
    data: int
    rules: Rules | None

    @property
    def recipe(self) -> Recipe | None:
        """What `quantize` says."""
        return make_recipe(self.quantize, self.target.chip.kind)

    def layout(self, mesh: Any) -> Layout:
        """What lies where on a mesh."""
        return make_layout(mesh, self.rules)

    def shape(self) -> Layout:
        """A layout to count with, of no devices."""
        sides = self.data, self.target.devices // self.data
        return self.layout(AbstractMesh(sides, ("data", "model"), axis_types=(AxisType.Auto,) * 2))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a device, from shapes."""

    weights: int
    cache: int
    read: int  # in a step, without the logits
    logits: int  # of one token a row
    draft: int  # read for one drafted token


def count(asked: Asked) -> Sizes:
    """What the arguments of a plan take, and what a step reads of it."""
    layout, dtype = asked.shape(), jnp.dtype(asked.dtype)
    rows = batch_rows(asked.batch, layout) // layout.parts("B")

    def of(config: ModelConfig) -> tuple[int, int, int]:
        """Weights, what a step reads of them and of the cache, and the cache."""
        fitted = fit_config(config, layout)
        shapes = param_shapes(fitted, dtype, layout, schemes_of(fitted, asked.recipe))
        held = bytes_a_device(shapes)
        # A table that is not the head as well is looked up, not read.
        table = 0 if config.tied else bytes_a_device(shapes["embed/table"])
        capacity = steps.capacity_for(asked.context)
        cells = cache.cache_bytes(fitted, rows, capacity, dtype, asked.cache_dtype)
        # A kernel reads what is there: not the slots that wait, nor what a window has left behind.
        live = sum(min(asked.context, layer.window or asked.context) for layer in fitted.layers)
        live *= -(-asked.batch // layout.parts("B")) * fitted.num_kv_heads * fitted.head_dim
        read = cache.stored_bytes(2 * live, fitted.head_dim, dtype, asked.cache_dtype)
        return held, held - table + read // layout.parts("K"), cells // layout.parts("K")

    weights, read, cells = of(asked.config)
    draft = draft_cells = draft_read = 0
    if asked.small is not None:
        draft, draft_read, draft_cells = of(asked.small)
    logits = 4 * rows * asked.config.vocab_size // layout.parts("V")
    return Sizes(weights + draft, cells + draft_cells, read, logits, draft_read)


def weights_met(asked: Asked) -> int:
    """Weights of a device that a token meets."""
    layout = asked.shape()
    shapes = param_shapes(fit_config(asked.config, layout), jnp.dtype(jnp.int8), layout)
    if not asked.config.tied:
        del shapes["embed/table"]  # looked up
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(shapes))
