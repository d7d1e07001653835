"""Mesh, and the one table that says which axis of the model lies along which axis of the mesh.

Weights, cache and logits are cut along these axes; what is not in the table lies whole on every
device. Where the heads do not divide over the devices, `spread_heads` makes more of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidArgument

Rules = Mapping[str, str | None]  # a name of LETTERS -> an axis of the mesh, or None: whole

RULES: Rules = {"batch": "data", "vocab": "model", "hidden": "model", "heads": "model"}
# Query and key/value heads go together: a query head is where the keys it looks at are.
LETTERS = {"batch": "B", "vocab": "V", "hidden": "F", "heads": "NK"}
REPLICATED: Rules = {"vocab": None, "hidden": None, "heads": None}  # a small drafter, for example


def make_mesh(model: int = 1, data: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of data x model devices: batch rows along `data`, heads and widths along `model`.

    Neighbours in `devices` are neighbours along `model`, where most is said.
    """
    devices = list(jax.devices() if devices is None else devices)
    if model < 1 or data < 1 or model * data > len(devices):
        raise InvalidArgument(
            f"mesh data={data} x model={model} needs {model * data} devices, not {len(devices)}"
        )
    grid = np.array(devices[: model * data]).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays lie on the devices; hashable, so that a jitted step can take it as static."""

    mesh: Mesh | None = None  # None: one device
    cuts: tuple[tuple[str, str], ...] = ()  # (axis letter, axis of the mesh)

    def along(self, axis: str) -> str | None:
        """The axis of the mesh along which the axis with this letter is cut."""
        return dict(self.cuts).get(axis)

    def parts(self, axis: str) -> int:
        """Into how many parts the axis with this letter is cut."""
        along = self.along(axis)
        return self.mesh.shape[along] if self.mesh and along else 1

    def spec(self, axes: str) -> PartitionSpec:
        """Of an array with these axis letters; any other letter stands for an axis left whole."""
        cuts = [self.along(axis) for axis in axes]
        while cuts and cuts[-1] is None:  # as JAX writes the sharding of a result: else a step
            cuts.pop()  # that gets its own result back would be compiled again
        return PartitionSpec(*cuts)

    def sharding(self, axes: str = "") -> jax.sharding.Sharding:
        """The same, with the devices; of no letters: whole on every device."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(self.mesh, self.spec(axes))

    @property
    def platform(self) -> str:
        """What kind of devices they are: "cpu", "gpu" or "tpu"."""
        return (self.mesh.devices.flat[0] if self.mesh else jax.local_devices()[0]).platform

    def constrain(self, x: jax.Array, axes: str) -> jax.Array:
        """`x`, inside a jitted step, laid so."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))


ONE_DEVICE = Layout()


def make_layout(mesh: Mesh | None, rules: Rules | None = None) -> Layout:
    """The layout of a mesh under RULES, with what `rules` says instead of them.

    Raises InvalidArgument for a rule about something else, or an axis that the mesh lacks.
    """
    for name, along in (rules or {}).items():
        if name not in RULES:
            raise InvalidArgument(f"rules: nothing is called {name!r:.40}; {', '.join(RULES)} are")
        if along is not None and (mesh is None or along not in mesh.shape):
            there = ", ".join(mesh.shape) if mesh else "none: give mesh="
            raise InvalidArgument(f"rules: {name!r} along {along!r:.40}; axes of the mesh: {there}")
    if mesh is None:
        return ONE_DEVICE
    if isinstance(mesh, Mesh) and not any(
        d.process_index == jax.process_index() for d in mesh.devices.flat
    ):
        raise InvalidArgument(f"the mesh has no device of process {jax.process_index()}: use all")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise InvalidArgument("the mesh must have axes of type Auto, as jaxinfer.make_mesh's are")
    both = {**{name: axis for name, axis in RULES.items() if axis in mesh.shape}, **(rules or {})}
    if both.get("batch") and both["batch"] in [both.get(name) for name in REPLICATED]:
        raise InvalidArgument(f"rules: {both['batch']!r} cuts the batch and nothing else beside it")
    if rules is None and not any(both.values()) and mesh.size > 1:
        raise InvalidArgument(
            f"no rule cuts anything along {', '.join(mesh.shape)}: name the axes of the mesh"
            f" {', '.join(dict.fromkeys(filter(None, RULES.values())))}, or give rules="
        )
    cuts = {letter: axis for name, axis in both.items() if axis for letter in LETTERS[name]}
    return Layout(mesh, tuple(cuts.items()))


def put(x: Any, where: jax.sharding.Sharding) -> jax.Array:
    """A value that every process has, on these devices; an array that lies on them stays."""
    if isinstance(x, jax.Array) and x.committed and x.sharding.device_set == where.device_set:
        return x
    if where.is_fully_addressable:
        return jax.device_put(x, where)
    value = np.asarray(x)  # device_put would ask the other processes whether theirs is the same
    return jax.make_array_from_callback(value.shape, where, lambda part: value[part])


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of an array, in every process."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def fit_config(config: ModelConfig, layout: Layout) -> ModelConfig:
    """The config of a model on these devices: with more heads where those it has do not divide.

    Raises:
      InvalidArgument: the vocabulary or the hidden width does not divide; says what would.
    """
    for axis in "VF":
        parts = layout.parts(axis)
        if config.size(axis) % parts:
            fits = [n for n in range(1, 65) if not config.size(axis) % n]
            raise InvalidArgument(
                f"axis {axis} of length {config.size(axis)} does not divide over {parts} devices;"
                f" numbers up to 64 that work: {', '.join(map(str, fits))}"
            )
    return spread_heads(config, layout.parts("N"))


def spread_heads(config: ModelConfig, parts: int) -> ModelConfig:
    """The same model with key/value heads that divide over `parts` devices.

    A key/value head may stand several times, with its query heads dealt out among the copies;
    what is then still missing is filled up with heads of zeros. Of the ways to do it the one with
    the fewest heads is taken.
    """
    n, k = config.num_heads, config.num_kv_heads
    if k % parts == 0:
        return config

    def spread(copies: int) -> tuple[int, int]:
        kv = -(-k * copies // parts) * parts
        return kv * -(-n // k // copies), kv

    heads, kv = min((spread(copies) for copies in range(1, n // k + 1)), key=sum)
    return dataclasses.replace(config, num_heads=heads, num_kv_heads=kv, checkpoint_heads=(n, k))


def spread_note(config: ModelConfig) -> str | None:
    """A line about what `spread_heads` did, if it did anything."""
    if config.checkpoint_heads is None:
        return None
    n, k = config.checkpoint_heads
    return (
        f"{n} query and {k} key/value heads do not divide over the mesh: {config.num_heads} and"
        f" {config.num_kv_heads} are stored"
    )


def head_sources(config: ModelConfig) -> dict[str, np.ndarray]:
    """Which head of the checkpoint each head is: {"N": [N], "K": [K]} int; -1 for a head of zeros.

    None of the two where `spread_heads` had nothing to do.
    """
    if config.checkpoint_heads is None:
        return {}
    n, k = config.checkpoint_heads
    group, each = n // k, config.num_heads // config.num_kv_heads  # query heads of a kv head
    copies = config.kv_copies
    slot = np.arange(config.num_kv_heads)
    kv = np.where(slot < k * copies, slot // copies, -1)
    within = (slot % copies)[:, None] * each + np.arange(each)  # [K,G]
    query = np.where((kv[:, None] >= 0) & (within < group), kv[:, None] * group + within, -1)
    return {"N": query.reshape(-1), "K": kv}
