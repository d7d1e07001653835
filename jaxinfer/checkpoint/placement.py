"""A loaded model as a whole, and where each of its parameters lies; the same for every format."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from jaxinfer import memory
from jaxinfer.config import ModelConfig
from jaxinfer.model import Params, ParamSpec, param_dtype, param_specs
from jaxinfer.sampling import SamplingParams
from jaxinfer.sharding import check_divisible, sharding
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


def placement(spec: ParamSpec, mesh: Mesh | None) -> jax.sharding.Sharding:
    """Where a parameter lies."""
    return sharding(spec.axes, mesh) if mesh else SingleDeviceSharding(jax.devices()[0])


def require_room(
    config: ModelConfig, specs: dict[str, ParamSpec], dtype: jnp.dtype, mesh: Mesh | None
) -> None:
    """Before a read: OutOfMemory or InvalidArgument unless the weights fit the devices."""
    if mesh:
        check_divisible(config, mesh)
    needed = sum(math.prod(s.shape) * param_dtype(p, dtype).itemsize for p, s in specs.items())
    devices = list(mesh.devices.flat) if mesh else jax.devices()[:1]
    advice = "a smaller model, dtype=bfloat16 or more devices (mesh=)"
    memory.require(needed, f"the weights in {jnp.dtype(dtype).name}", advice, devices)
