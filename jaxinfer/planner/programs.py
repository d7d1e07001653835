"""The programs that would run, compiled for a TPU slice from shapes alone: no TPU, no weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from jaxinfer import cache, steps
from jaxinfer.batch import Model, make_run
from jaxinfer.sampling import greedy_rows
from jaxinfer.speculative import round as speculative
from jaxinfer.speculative.costs import Costs
from jaxinfer.speculative.drafter import NoDrafter
from jaxinfer.speculative.speculation import Speculation

SENT = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
BITS = {"pred": 8, "bf16": 16}  # of dtypes that do not end with theirs, as f32 and s8 do


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program; bytes are a device's."""

    name: str  # prefill, decode or verify
    seconds: float  # that compiling took
    arguments: int
    temporaries: int  # code included
    accessed: int  # every touch of every operation: loops once, branches that are not taken too
    collectives: dict[str, int]  # how many of each kind the program holds, a loop's body once
    largest: int  # bytes of the largest collective's result


class DoesNotFit(Exception):
    """The compiler found no room for a program; the message is its own."""


def compile_all(
    model: Model, speculation: Speculation, *, batch: int, capacity: int
) -> list[Program]:
    """Prefill, decode and, with a drafter, verify: what `LLM.generate` runs for such a batch.

    Args:
      model: its params are `param_shapes`, its layout that of a slice's devices.
      speculation: a drafter with a fixed number of tokens; its weights are shapes too.
      batch, capacity: rows, and cache slots a row.

    Raises:
      DoesNotFit: a program needs more memory than a device has.
    """
    drafter = speculation.drafter
    verify = speculative.Plan(speculation.plan(1).verifier, (drafter.max_draft + 1,))
    plain = Speculation(NoDrafter())
    wanted = [("prefill", speculation, verify), ("decode", plain, plain.plan(1))]
    if drafter.max_draft:
        wanted.append(("verify", speculation, verify))

    def one(job: tuple[str, Speculation, speculative.Plan]) -> Program:
        return _compile(model, *job, batch=batch, capacity=capacity)

    # The compiler lets go of Python's lock.
    with _no_compile_cache(), ThreadPoolExecutor(len(wanted)) as pool:
        return list(pool.map(one, wanted))


@contextlib.contextmanager
def _no_compile_cache() -> Iterator[None]:
    """What is compiled for another machine cannot be loaded here: it has no place in the cache."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


def _compile(
    model: Model,
    name: str,
    speculation: Speculation,
    plan: speculative.Plan,
    *,
    batch: int,
    capacity: int,
) -> Program:
    def make() -> Any:
        run = make_run(
            model,
            speculation,
            plan,
            Costs(),
            prompts=[[0]] * batch,
            limits=[capacity] * batch,
            capacity=capacity,
            logprobs=False,
        )
        return run, greedy_rows(batch, model.config.vocab_size), jnp.int32(0)

    run, rows, max_new = _laid(jax.eval_shape(make), model)
    drafter = _laid(speculation.drafter, model)
    mesh: Any = model.layout.mesh
    begin = time.perf_counter()
    # Pallas asks the mesh, not the default device, which chip it compiles for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), tempfile.TemporaryDirectory() as dump:
        if name == "prefill":
            width = steps.bucket(capacity, steps.PREFILL_WIDTHS)
            lowered = speculative.prefill.lower(
                model.params, run, drafter, config=model.config, width=width
            )
        else:
            lowered = speculative.rounds.lower(
                model.params, run, rows, drafter, max_new, config=model.config, plan=plan
            )
        try:
            # jaxlib 0.10 cannot read libtpu's programs back, so the compiler writes them itself.
            done: Any = lowered.compile(
                compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise DoesNotFit(str(error).splitlines()[0]) from error
            raise
        seconds = time.perf_counter() - begin
        text = next(Path(dump).glob("*after_optimizations.txt")).read_text()
    sizes = done.memory_analysis()
    collectives, largest = _collectives(text)
    return Program(
        name,
        seconds,
        sizes.argument_size_in_bytes,
        sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes,
        int(done.cost_analysis()["bytes accessed"]),
        collectives,
        largest,
    )


def _laid(tree: Any, model: Model) -> Any:
    """Shapes with the shardings that `Model.place` would give; what has one keeps it."""

    def lay(x: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None:
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(lay, tree, cache.shardings(tree, model.layout))


def _collectives(text: str) -> tuple[dict[str, int], int]:
    """How many collectives of each kind a program holds, and bytes of the largest one's result."""
    counts: dict[str, int] = {}
    largest = 0
    for shapes, kind in re.findall(rf"= (\(?\S.*?) ({SENT})(?:-start)?\(", text):
        counts[kind] = counts.get(kind, 0) + 1
        for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
            bits = BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
            size = math.prod(int(n) for n in dims.split(",") if n) * bits // 8
            largest = max(largest, size)
    return counts, largest
