"""Mesh, and the one table that says which logical axis lies along which mesh axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidArgument

# Logical axis letter -> mesh axis; a letter that is absent lies whole on every device.
RULES: Mapping[str, str] = {"B": "data", "V": "model", "F": "model", "N": "model", "K": "model"}


def make_mesh(model: int = 1, data: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of data x model devices: batch rows along `data`, heads and widths along `model`."""
    devices = list(jax.devices() if devices is None else devices)
    if model < 1 or data < 1 or model * data > len(devices):
        raise InvalidArgument(
            f"mesh data={data} x model={model} needs {model * data} devices, not {len(devices)}"
        )
    grid = np.array(devices[: model * data]).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def sharding(axes: Sequence[str], mesh: Mesh, rules: Mapping[str, str] = RULES) -> NamedSharding:
    """How an array with these axis letters lies on the mesh."""
    return NamedSharding(mesh, PartitionSpec(*(rules.get(axis) for axis in axes)))


def check_divisible(config: ModelConfig, mesh: Mesh, rules: Mapping[str, str] = RULES) -> None:
    """Refuse a mesh over which an axis of the model does not divide evenly."""
    for axis in "VFNK":
        devices = mesh.shape[rules[axis]] if axis in rules else 1
        if config.size(axis) % devices:
            fits = [n for n in range(1, 65) if not any(config.size(a) % n for a in "VFNK")]
            raise InvalidArgument(
                f"axis {axis} of length {config.size(axis)} does not divide over {devices} devices;"
                f" sizes of 'model' that work: {', '.join(map(str, fits))}"
            )
