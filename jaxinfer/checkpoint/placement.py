"""A loaded model as a whole, and where each of its parameters lies; the same for every format."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import memory
from jaxinfer.checkpoint.parameters import Select
from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidArgument
from jaxinfer.model import Params, ParamSpec, param_dtype, param_specs
from jaxinfer.quantize import FP8, Quantized, Scheme, quantize
from jaxinfer.recipes import Recipe, Schemes, is_matrix, matrix_size
from jaxinfer.sampling import SamplingParams
from jaxinfer.sharding import Layout, fit_config, head_sources, put
from jaxinfer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded model."""

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer
    default_params: SamplingParams
    eos_ids: tuple[int, ...]


def flat_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Path such as "layer_0/attn/q/kernel" -> spec."""
    leaves = jax.tree.leaves_with_path(
        param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec)
    )
    return {"/".join(key.key for key in path): spec for path, spec in leaves}


def nest(flat: dict[str, Any]) -> Params:
    """The nested dict of a flat one."""
    out: Params = {}
    for path, value in flat.items():
        *rooms, leaf = path.split("/")
        room = out
        for name in rooms:
            room = room.setdefault(name, {})
        room[leaf] = value
    return out


def flatten(params: Params) -> dict[str, Any]:
    """The flat dict of a nested one, which `nest` undoes; a quantized weight is one entry."""
    leaves = jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, Quantized))
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def matrix_part(
    spec: ParamSpec, transposed: bool, index: Sequence[slice], heads: Mapping[str, np.ndarray]
) -> tuple[Select, Select]:
    """A part of a parameter, as OUT and IN features of the checkpoint's matrix.

    Args:
      spec: the parameter; its leading letters are IN features where `transposed`, else OUT.
      transposed: as the parameter's `names.Piece` says.
      index: the part, a slice an axis, as shardings give it.
      heads: as `sharding.head_sources` gives it.
    """
    split = 1 if spec.axes == "VD" else len(spec.inputs if transposed else spec.axes)
    parts = [slice(*cut.indices(size)) for cut, size in zip(index, spec.shape, strict=True)]
    first = _features(spec, parts, range(split), heads)
    second = _features(spec, parts, range(split, len(parts)), heads)
    return (second, first) if transposed else (first, second)


def _features(
    spec: ParamSpec, parts: Sequence[slice], axes: range, heads: Mapping[str, np.ndarray]
) -> Select:
    """Numbers of the features in these parts of these axes, counted as the checkpoint has them."""
    if len(axes) == 1 and spec.axes[axes[0]] not in heads:
        return parts[axes[0]]
    numbers = np.zeros(1, np.int64)
    for i in axes:
        letter, size = spec.axes[i], spec.shape[i]
        own = np.arange(size) if letter not in heads else heads[letter]
        here = own[parts[i]]
        # Behind a head of zeros every channel is zero.
        joint = numbers[:, None] * size + here
        numbers = np.where((numbers[:, None] < 0) | (here < 0), -1, joint).reshape(-1)
    if (numbers[0] >= 0) and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers


def lay_params(params: Params, config: ModelConfig, layout: Layout) -> tuple[Params, ModelConfig]:
    """Weights that are in memory, on the devices of a layout; and the config that they then have.

    Whatever is not on those devices yet is put whole on each of them first, one at a time.
    """
    fitted = fit_config(config, layout)
    heads = head_sources(fitted)

    def move(spec: ParamSpec, x: jax.Array) -> jax.Array:
        where = layout.sharding(spec.axes)
        if not set(heads) & set(spec.axes) and where.is_fully_addressable:
            return jax.device_put(x, where)
        spread = partial(_spread_heads, axes=spec.axes, heads=heads)
        return jax.jit(spread, out_shardings=where)(put(x, layout.sharding()))

    specs = param_specs(config)
    return jax.tree.map(move, specs, params, is_leaf=lambda x: isinstance(x, ParamSpec)), fitted


def _spread_heads(x: jax.Array, *, axes: str, heads: Mapping[str, np.ndarray]) -> jax.Array:
    for i, letter in enumerate(axes):
        if letter in heads:
            source = heads[letter]
            x = jnp.take(x, np.maximum(source, 0), axis=i)
            real = (source >= 0).reshape([-1] + [1] * (x.ndim - 1 - i))
            x = jnp.where(real, x, jnp.zeros((), x.dtype))
    return x


def schemes_of(config: ModelConfig, recipe: Recipe | None) -> Schemes:
    """What a recipe says of each parameter.

    Raises InvalidArgument where a matrix does not divide.
    """
    if recipe is None:
        return {}
    found = {
        path: recipe.scheme(path, *matrix_size(spec.shape, spec.inputs))
        for path, spec in flat_specs(config).items()
    }
    for pattern, _ in recipe.rules:
        if not any(re.search(pattern, path) for path in found if is_matrix(path)):
            raise InvalidArgument(
                f"quantize={recipe.text:.60}: no matrix of the model has {pattern!r:.30} in its"
                " name, which is such as layer_0/attn/q/kernel"
            )
    return {path: scheme for path, scheme in found.items() if scheme is not None}


def param_shapes(
    config: ModelConfig, dtype: jnp.dtype, layout: Layout, schemes: Schemes | None = None
) -> dict[str, Any]:
    """Path of each parameter -> what it will be: shapes, dtypes and shardings, without an array.

    Raises InvalidArgument where the groups of a scheme do not divide over the devices.
    """

    def one(path: str, spec: ParamSpec) -> Any:
        kind, scheme = param_dtype(path, dtype), (schemes or {}).get(path)
        if scheme is None:
            return shape_of(spec.shape, spec.axes, kind)
        outputs, count = matrix_size(spec.shape, spec.inputs)
        groups = scheme.groups(count)
        out = next(a for i, a in enumerate(spec.axes) if i not in spec.inputs)
        into = spec.axes[spec.inputs[0]]
        # A letter that cuts the inputs cuts the groups, or the inputs of the only one.
        cut = f"{into}{out}" if groups > 1 else f"_{out}"
        stored = groups, outputs // scheme.in_byte, count // groups
        for size, letter in zip(stored, cut, strict=False):
            if size % layout.parts(letter):
                raise InvalidArgument(
                    f"{path}: {size} {'groups' if letter == into else 'bytes of codes'} do not"
                    f" divide over {layout.parts(letter)} devices; quantize=int8 does"
                )
        code: Any = FP8 if scheme.fp8 else jnp.int8
        values: Any = shape_of(stored, cut if groups > 1 else cut + into, code)
        scale: Any = shape_of((groups, outputs), cut, jnp.dtype(scheme.scale_dtype))
        offset = scale if scheme.zero else None
        return Quantized(values, scale, offset, scheme, spec.shape, spec.inputs, kind)

    def shape_of(shape: tuple[int, ...], axes: str, kind: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=layout.sharding(axes))

    return {path: one(path, spec) for path, spec in flat_specs(config).items()}


def keep(x: jax.Array, shape: Any) -> Any:
    """A parameter as its entry of `param_shapes` says."""
    if not isinstance(shape, Quantized):
        return x
    where = jax.tree.map(lambda leaf: leaf.sharding, shape)
    return _quantize(x, shape.inputs, shape.scheme, tuple(jax.tree.leaves(where)))


def keep_params(
    params: Params, config: ModelConfig, dtype: jnp.dtype, layout: Layout, recipe: Recipe
) -> Params:
    """Weights that are in memory and lie on `layout`, kept as a recipe says.

    Raises OutOfMemory where there is no room for them beside the others.
    """
    shapes = param_shapes(config, dtype, layout, schemes_of(config, recipe))
    require_room(shapes, layout)
    return jax.tree.map(keep, params, nest(shapes))


@partial(jax.jit, static_argnums=(1, 2, 3))  # one program a shape, not one a matrix
def _quantize(
    x: jax.Array,
    inputs: tuple[int, ...],
    scheme: Scheme,
    where: tuple[jax.sharding.Sharding, ...],
) -> Quantized:
    made = quantize(x, inputs, scheme)
    leaves, tree = jax.tree.flatten(made)
    laid = [jax.lax.with_sharding_constraint(x, s) for x, s in zip(leaves, where, strict=True)]
    return jax.tree.unflatten(tree, laid)


def bytes_a_device(shapes: Any) -> int:
    """Bytes that each device holds of arrays with these shapes and shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )


def require_room(shapes: Mapping[str, Any], layout: Layout) -> None:
    """Before a read: OutOfMemory unless the weights fit the devices."""
    devices = sorted(layout.sharding().device_set, key=lambda d: d.id)  # type: ignore[attr-defined]
    advice = "a smaller model, dtype=bfloat16, quantize=int8 or more devices (mesh=)"
    memory.require(bytes_a_device(shapes), "the weights", advice, devices)
