"""A machine that a plan is made for, by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from jaxinfer import memory
from jaxinfer.errors import InvalidArgument, JaxinferError
from jaxinfer.hardware import CHIPS, TOPOLOGIES, TOPOLOGY_OPTIONS, Chip
from pallas_kernels.tpu_aot import ENVIRONMENT

MAX_GPUS = 1024


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips that work together."""

    name: str  # as it was asked for
    chip: Chip
    chips: int

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.chip.devices

    @property
    def limit(self) -> float:
        """Bytes of a device that programs can have; of a GPU's memory JAX takes three quarters."""
        share = 0.75 if self.chip.kind == "gpu" else 1.0
        return share * self.chip.usable_bytes / self.chip.devices


def find_target(name: str) -> Target:
    """The machine with this name; InvalidArgument says which there are."""
    kind, _, size = name.lower().partition(":")
    if kind == "cpu" and size in ("", "1"):
        return Target(name, _this_cpu(), 1)
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=3) or CHIPS
        raise InvalidArgument(f"topology={name!r:.60}: no such chip; there are {', '.join(near)}")
    if kind in TOPOLOGIES:
        if size not in TOPOLOGIES[kind]:
            there = ", ".join(f"{kind}:{slice_}" for slice_ in TOPOLOGIES[kind])
            raise InvalidArgument(f"topology={name!r:.60}: no such slice; there are {there}")
        return Target(name, CHIPS[kind], math.prod(map(int, size.split("x"))))
    count = int(size or 1) if (size or "1").isdecimal() and len(size) < 5 else 0
    if not 1 <= count <= MAX_GPUS:
        raise InvalidArgument(f"topology={name!r:.60}: how many? {kind}:1 to {kind}:{MAX_GPUS}")
    return Target(name, CHIPS[kind], count)


def _this_cpu() -> Chip:
    """This machine: its memory, and how fast it reads a matrix much larger than its caches."""
    matrix = jnp.ones((4096, 16384), jnp.float32)
    rows = jnp.ones((2, 4096), jnp.float32)
    product = jax.jit(lambda x, w: x @ w)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        product(rows, matrix).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    available = memory.available_bytes(jax.devices()[0])
    return Chip(
        name="cpu",
        kind="cpu",
        memory_bytes=psutil.virtual_memory().total,
        usable_bytes=available,
        bandwidth=matrix.nbytes / min(seconds[1:]),
        flops=math.inf,  # not measured: reading bounds a step
        int8_ops=None,
        link_bandwidth=None,
        source="measured here, now",
    )


def tpu_devices(target: Target) -> list[Any]:
    """The devices of a TPU slice, as its compiler sees them; none is needed here.

    Raises JaxinferError where libtpu is not installed.
    """
    from jax.experimental import topologies

    for variable, value in ENVIRONMENT.items():  # what libtpu asks of its surroundings
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(
            target.name.lower(), "tpu", **TOPOLOGY_OPTIONS.get(target.chip.name, {})
        )
    except RuntimeError as error:
        raise JaxinferError(
            "the TPU compiler is missing: pip install 'jaxinfer[plan]' (libtpu, Linux), or plan"
            f" from shapes alone with compile=False ({str(error).splitlines()[0]:.120})"
        ) from error
    return list(found.devices)
