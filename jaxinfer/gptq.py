"""GPTQ (arXiv 2210.17323): rounding that looks at what a model does with a text.

To round a weight to nearest is the best for that weight alone. GPTQ rounds the inputs of a matrix
one after the other, the one with the largest activations first, and after each moves those that
are left so that they make up for its error, as far as the activations of a text let them. Scales
are chosen before, with errors counted as the text feeds them. It is chosen over AWQ (arXiv
2306.00978), which scales inputs up before they are rounded to nearest, because it knows no knobs
that have to be searched for, and leaves every other parameter of the model as it is.

A layer at a time: each sees the activations that the layers before it, rounded, hand on. The head
comes last; where it is the embedding table as well, that is how its rows are looked up, too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxinfer.checkpoint.placement import flat_specs, flatten, keep, nest, param_shapes
from jaxinfer.config import ModelConfig
from jaxinfer.layerwise import embed, final_moments, read_layer
from jaxinfer.model import Params
from jaxinfer.quantize import (
    Quantized,
    Scheme,
    decode,
    encode,
    find_scale,
    pack,
    to_groups,
)
from jaxinfer.recipes import Schemes
from jaxinfer.sharding import ONE_DEVICE

DAMPING = 0.01  # of the mean squared activation, added to each: the paper's
BLOCK = 32  # inputs after which the error of all of them is made up for by the others


def round_model(
    params: Params, config: ModelConfig, schemes: Schemes, tokens: np.ndarray, dtype: jnp.dtype
) -> Params:
    """The model with its matrices rounded.

    Args:
      params: on one device, not quantized.
      config: of the model.
      schemes: how matrices are kept; what is fp8, or only looked up, is rounded to nearest.
      tokens: [n,W] int32, stretches of text.
      dtype: of the activations.
    """
    specs, shapes = flat_specs(config), param_shapes(config, dtype, ONE_DEVICE, schemes)
    nearest = nest(shapes)
    rounded = {
        name: jax.tree.map(keep, room, nearest[name])
        for name, room in params.items()
        if not name.startswith("layer_")
    }
    x = embed(rounded, tokens, config)
    for i, layer in enumerate(tqdm(config.layers, desc="calibrating", unit="layer", leave=False)):
        name = f"layer_{i}"
        _, moments = read_layer(params[name], x, config, layer, measured=True)
        new: dict[str, Any] = {}
        for path, held in flatten(params[name]).items():
            full = f"{name}/{path}"
            scheme = schemes.get(full)
            if scheme is None or scheme.fp8:
                new[path] = keep(held, shapes[full])
            else:
                fed = moments[path.rpartition("/")[0]]
                new[path] = round_matrix(held, specs[full].inputs, scheme, fed)
        rounded[name] = nest(new)
        x, _ = read_layer(rounded[name], x, config, layer, measured=False)
    table = "embed" if config.tied else "head"
    scheme = schemes.get(f"{table}/table")
    if scheme and not scheme.fp8:
        moments_of_head = final_moments(params, x, config)
        held = params[table]["table"]
        rounded[table] = {"table": round_matrix(held, (1,), scheme, moments_of_head)}
    return rounded


def round_matrix(
    w: jax.Array, inputs: tuple[int, ...], scheme: Scheme, moments: np.ndarray
) -> Quantized:
    """A matrix rounded so that its products with a text change least.

    Args:
      w: as for `quantize.quantize`.
      inputs, scheme: the same.
      moments: [I,I] f64, sum of x x^T over the text's inputs x [I].
    """
    x = to_groups(w.astype(jnp.float32), inputs, scheme)  # [G,O,I]
    groups, outputs, size = x.shape
    energy = np.einsum("ii->i", moments).astype(np.float32)
    weight = jnp.asarray(energy).reshape(groups, 1, size)
    x = jnp.where(weight > 0, x, 0)  # an input that is always zero needs no room in a scale
    found = [_scale(x[g : g + 1], scheme, weight[g : g + 1]) for g in range(groups)]
    scale, offset = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)  # [G,O]
    # The largest first: what is rounded early is made up for by all that is left.
    order = np.argsort(-energy, kind="stable")
    rows = np.array(jnp.moveaxis(x, 1, 0).reshape(outputs, -1))[:, order]  # [O,all]
    upper = _inverse_root(moments[np.ix_(order, order)])
    codes = np.empty(rows.shape, np.int8)
    for a in range(0, rows.shape[1], BLOCK):
        b = min(a + BLOCK, rows.shape[1])
        group = order[a:b] // size
        scales = scale[group], None if offset is None else offset[group]
        made, errors = _round_block(
            jnp.asarray(rows[:, a:b]), upper[a:b, a:b], *scales, scheme=scheme
        )
        rows[:, b:] -= np.asarray(errors) @ upper[a:b, b:]
        codes[:, order[a:b]] = np.asarray(made)
    whole = jnp.asarray(codes).reshape(outputs, groups, size).swapaxes(0, 1)
    return Quantized(pack(whole, scheme), scale, offset, scheme, w.shape, inputs, w.dtype)


_scale = jax.jit(find_scale, static_argnums=1)  # one program a shape, not one a group


def _inverse_root(moments: np.ndarray) -> np.ndarray:
    """U [I,I] f32, upper triangular, with U^T U the inverse of the damped moments."""
    h = np.array(moments)
    diagonal = np.einsum("ii->i", h)
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)


@partial(jax.jit, static_argnames=("scheme",))
def _round_block(
    w: jax.Array,  # [O,b] f32
    upper: jax.Array,  # [b,b]
    scale: jax.Array,  # [b,O]
    offset: jax.Array | None,  # [b,O]
    *,
    scheme: Scheme,
) -> tuple[jax.Array, jax.Array]:
    """Codes [O,b], and the errors [O,b] that the inputs behind the block are to make up for."""

    def one(j: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w, codes, errors = carry
        column = jax.lax.dynamic_slice_in_dim(w, j, 1, axis=1)
        its_scale, its_offset = jax.tree.map(lambda s: s[j], (scale, offset))
        code = encode(column, its_scale, its_offset, scheme)
        row = jax.lax.dynamic_slice_in_dim(upper, j, 1, axis=0)  # [1,b], zero before j
        error = (column - decode(code, its_scale, its_offset, scheme)) / row[0, j]
        w = w - error * row
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=j, axis=1)
        return w, put(codes, code), put(errors, error)

    start = w, jnp.zeros(w.shape, jnp.int8), jnp.zeros_like(w)
    _, codes, errors = jax.lax.fori_loop(0, w.shape[1], one, start)
    return codes, errors
