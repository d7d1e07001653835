"""Pruning: a smaller model out of a larger one, by what matters least for a text.

Layers are dropped by how little they turn the residual stream (arXiv 2403.03853), hidden units by
how little they add to it, and of four neighbouring weights the two that weigh least times their
inputs become zeros (arXiv 2306.11695). Nothing is trained afterwards: a pruned model is a drafter,
or a beginning.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxinfer.checkpoint.placement import flat_specs, flatten, nest
from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidArgument
from jaxinfer.layerwise import Moments, embed, read_layer
from jaxinfer.model import Params
from jaxinfer.quantize import Scheme, from_groups, to_groups
from jaxinfer.recipes import is_matrix, matrix_size

SPARSITY = ("2:4",)


class Importance(NamedTuple):
    """What a text tells of a model."""

    layers: np.ndarray  # [L] f64: 1 - cosine between the stream in front of a layer and behind it
    moments: list[Moments]  # of each layer


def measure(params: Params, config: ModelConfig, tokens: np.ndarray) -> Importance:
    """Read stretches [n,W] of a text with every layer."""
    x = embed(params, tokens, config)
    turned, moments = [], []
    for i, layer in enumerate(tqdm(config.layers, desc="measuring", unit="layer", leave=False)):
        y, found = read_layer(params[f"layer_{i}"], x, config, layer, measured=True)
        a, b = np.float64(x), np.float64(y)
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        turned.append(1 - float(np.mean(np.sum(a * b, axis=-1) / np.maximum(norms, 1e-30))))
        moments.append(found)
        x = y
    return Importance(np.array(turned), moments)


def check_options(drop_layers: int, width: int | None, sparsity: str | None) -> None:
    """Raise InvalidArgument where no model could be pruned so."""
    if sparsity not in (None, *SPARSITY):
        raise InvalidArgument(f"sparsity={sparsity!r:.20}: {', '.join(SPARSITY)}")
    if not drop_layers and width is None and sparsity is None:
        raise InvalidArgument("nothing to prune: drop_layers, width or sparsity say what")


def check(
    config: ModelConfig,
    *,
    drop_layers: int = 0,
    width: int | None = None,
    sparsity: str | None = None,
) -> None:
    """Raise InvalidArgument where `prune` cannot do that to a model, or where it is nothing."""
    if not 0 <= drop_layers < config.num_layers:
        raise InvalidArgument(
            f"drop_layers={drop_layers}: 0 to {config.num_layers - 1}, the model has"
            f" {config.num_layers}"
        )
    if width is not None and not 1 <= width < config.hidden:
        raise InvalidArgument(f"width={width}: 1 to {config.hidden - 1}, less than the model's own")
    check_options(drop_layers, width, sparsity)
    if sparsity is None:
        return
    narrowed = dataclasses.replace(config, hidden=width or config.hidden)
    for path, spec in flat_specs(narrowed).items():
        inputs = matrix_size(spec.shape, spec.inputs)[1] if is_matrix(path) else 0
        if path.startswith("layer_") and inputs % 4:
            raise InvalidArgument(
                f"sparsity=2:4: four does not divide the {inputs} inputs of {path}"
            )


def prune(
    params: Params,
    config: ModelConfig,
    importance: Importance,
    *,
    drop_layers: int = 0,
    width: int | None = None,
    sparsity: str | None = None,
) -> tuple[Params, ModelConfig]:
    """A smaller model.

    Args:
      params, config: of the model; not quantized, on one device.
      importance: as `measure` found it.
      drop_layers: how many layers are left out.
      width: hidden units F that are kept in every MLP; None: all.
      sparsity: "2:4", two of four neighbouring inputs are zero in each matrix of a layer. They are
        stored as zeros, for hardware that skips them; nothing here gets smaller or faster by it.

    Raises:
      InvalidArgument: as `check` does.
    """
    check(config, drop_layers=drop_layers, width=width, sparsity=sparsity)
    kept = sorted(np.argsort(importance.layers, kind="stable")[drop_layers:].tolist())
    pruned = {name: room for name, room in params.items() if not name.startswith("layer_")}
    for new, old in enumerate(kept):
        layer, moments = params[f"layer_{old}"], importance.moments[old]
        if width is not None:
            units = _units(layer["mlp"], moments["mlp/down"], width)
            layer = {**layer, "mlp": _narrow(layer["mlp"], units)}
            moments = {**moments, "mlp/down": moments["mlp/down"][np.ix_(units, units)]}
        if sparsity:
            layer = _two_of_four(layer, config, moments)
        pruned[f"layer_{new}"] = layer
    layers = tuple(config.layers[i] for i in kept)
    return pruned, dataclasses.replace(config, layers=layers, hidden=width or config.hidden)


def _units(mlp: Params, moments: np.ndarray, width: int) -> np.ndarray:
    """The hidden units that add most: mean square times that of their weights."""
    down = np.asarray(mlp["down"]["kernel"], np.float64)  # [F,D]
    weight = np.diagonal(moments) * np.sum(down**2, axis=1)
    return np.sort(np.argsort(-weight, kind="stable")[:width])


def _narrow(mlp: Params, units: np.ndarray) -> Params:
    """An MLP with these of its hidden units."""
    axes = {"gate": -1, "up": -1, "down": 0}
    return {
        name: {
            part: x if (name, part) == ("down", "bias") else jnp.take(x, units, axis=axes[name])
            for part, x in linear.items()
        }
        for name, linear in mlp.items()
    }


def _two_of_four(layer: Params, config: ModelConfig, moments: Moments) -> Params:
    """A layer with zeros in place of the two of four inputs that matter least to an output."""
    new: dict[str, Any] = {}
    specs = flat_specs(config)
    for name, x in flatten(layer).items():
        if is_matrix(name):
            inputs = specs[f"layer_0/{name}"].inputs  # of every layer the same
            rows = to_groups(x, inputs, Scheme())  # [1,O,I]
            felt = np.sqrt(np.diagonal(moments[name.rpartition("/")[0]]))
            weight = (jnp.abs(rows) * felt).reshape(-1, 4)
            order = jnp.argsort(jnp.argsort(weight, axis=1), axis=1)
            sparse = jnp.where(order.reshape(rows.shape) >= 2, rows, 0)
            x = from_groups(sparse.astype(x.dtype), x.shape, inputs)
        new[name] = x
    return nest(new)
