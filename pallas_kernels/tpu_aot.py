"""Compiles a kernel for a TPU on a machine that has none: `pip install libtpu` is all it needs."""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.case import Case
from pallas_kernels.chips import TPU

# The smallest slice of each chip; a kernel runs on one of its devices.
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}

# What libtpu asks of its surroundings before it answers; to be set before JAX starts.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Compiled(NamedTuple):
    """The compiler's own figures, in bytes."""

    seconds: float
    arguments: int
    temporaries: int


@functools.cache
def one_device(chip: str) -> NamedSharding:
    """A device of that chip; RuntimeError where libtpu is missing."""
    devices = topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices[:1]
    return NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())


def compile_case(case: Case, chip: str) -> Compiled:
    """Compile `case` for one device of `chip`; an exception says why it cannot be."""
    where = one_device(chip)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), case.shapes()
    )
    donated = {name: shapes[name] for name in case.donated}
    others = {name: x for name, x in shapes.items() if name not in donated}
    step = jax.jit(
        lambda gone, kept: case.run({**gone, **kept}, "pallas_tpu", TPU[chip]), donate_argnums=0
    )
    begin = time.perf_counter()
    # Pallas asks the mesh, not the default device, which chip it compiles for.
    with jax.sharding.use_abstract_mesh(where.mesh.abstract_mesh):
        compiled = step.lower(donated, others).compile()
    if "tpu_custom_call" not in (compiled.as_text() or ""):
        raise RuntimeError("compiled without the kernel")
    memory: Any = compiled.memory_analysis()
    return Compiled(
        time.perf_counter() - begin,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
    )
