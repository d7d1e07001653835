"""Products of int8 numbers, exactly, the way that each platform is fast with."""

from __future__ import annotations

import functools
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import batching, mlir

Pair: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # axes of x, axes of codes
Dims: TypeAlias = tuple[Pair, Pair]  # summed over, and of a batch: as of jax.lax.dot_general


def whole_dot(x: jax.Array, codes: jax.Array, dims: Dims) -> jax.Array:
    """x [.., R, ..] int8 times codes int8: [*batch, R, *rest] int32.

    On a CPU a single row is doubled, since XLA's product of one takes twenty times as long as of
    two; with AVX-512 VNNI it is another product of the same numbers, see `_unsigned`. The machine
    that traces decides: all hosts of a program must be of one kind.

    Args:
      x: with one axis R that `dims` does not name.
      codes: what lies in memory, and is to be read as it lies.
      dims: (summed over, batch), each a pair of tuples of axes, as `jax.lax.dot_general` takes it.
    """
    (summed, _), (batch, _) = dims
    (rows,) = set(range(x.ndim)) - {*summed, *batch}
    on_cpu = _unsigned if _has_vnni() else _signed
    return jax.lax.platform_dependent(
        x, codes, cpu=partial(on_cpu, dims=dims, rows=rows), default=partial(_plain, dims=dims)
    )


def _plain(x: jax.Array, codes: jax.Array, *, dims: Dims) -> jax.Array:
    return jax.lax.dot_general(x, codes, dims, preferred_element_type=jnp.int32)


def _signed(x: jax.Array, codes: jax.Array, *, dims: Dims, rows: int) -> jax.Array:
    if x.shape[rows] != 1:
        return _plain(x, codes, dims=dims)
    twice = _plain(jnp.concatenate([x, x], axis=rows), codes, dims=dims)
    return jax.lax.slice_in_dim(twice, 0, 1, axis=len(dims[1][0]))


def _unsigned(x: jax.Array, codes: jax.Array, *, dims: Dims, rows: int) -> jax.Array:
    """As bytes that are 128 too large; a row more, of 128s, is what that adds to each product.

    A CPU with AVX-512 VNNI multiplies bytes without a sign by bytes with one (`vpdpbusd`), and XLA
    has YNNPACK's kernels for it. [1536,576] with 2, 4, 8 and 32 rows takes 0.99, 0.82, 0.65 and
    0.45 of the time of two bytes with a sign, the row more included; keys and values [3,256,64] in
    a batch, with 6 and 48 rows, about 0.75. A sum that wraps around is put right by the difference.
    """
    raised = jax.lax.bitcast_convert_type(x, jnp.uint8) ^ 128
    more = [(0, int(axis == rows), 0) for axis in range(x.ndim)]
    y = _mixed_dot.bind(jax.lax.pad(raised, jnp.uint8(128), more), codes, axes=dims)
    product, added = jnp.split(y, [x.shape[rows]], axis=len(dims[1][0]))
    return product - added


@functools.cache
def _has_vnni(file: str = "/proc/cpuinfo") -> bool:
    """Whether this machine multiplies uint8 by int8; only Linux says so in a file."""
    try:
        return "avx512_vnni" in Path(file).read_text().split()
    except OSError:
        return False


# uint8 times int8. `jax.lax.dot_general` takes them too, but widens both to int32 first, for which
# XLA:CPU has no fast product; this one is StableHLO's product of the two as they are.
_mixed_dot = Primitive("mixed_dot")


@_mixed_dot.def_abstract_eval
def _mixed_shape(x: Any, codes: Any, *, axes: Dims) -> Any:
    out = jax.eval_shape(partial(_plain, dims=axes), x, codes)
    return x.update(shape=out.shape, dtype=out.dtype)


@_mixed_dot.def_impl
def _mixed_eagerly(x: jax.Array, codes: jax.Array, *, axes: Dims) -> jax.Array:
    with jax.disable_jit(False):  # or this would call itself
        return jax.jit(partial(_mixed_dot.bind, axes=axes))(x, codes)


def _mixed_lowering(ctx: Any, x: Any, codes: Any, *, axes: Dims) -> Any:
    (summed, summed_codes), (batch, batch_codes) = axes
    out = ir.RankedTensorType.get(ctx.avals_out[0].shape, ir.IntegerType.get_signless(32))
    dims = stablehlo.DotDimensionNumbers.get(
        lhs_batching_dimensions=list(batch),
        rhs_batching_dimensions=list(batch_codes),
        lhs_contracting_dimensions=list(summed),
        rhs_contracting_dimensions=list(summed_codes),
    )
    return [stablehlo.dot_general(out, x, codes, dims)]


def _mixed_vmapped(args: Any, mapped: Any, *, axes: Dims) -> Any:
    """Under vmap: one more axis of the batch, in front of all others."""
    size = next(a.shape[m] for a, m in zip(args, mapped, strict=True) if m is not None)

    def in_front(a: jax.Array, axis: int | None) -> jax.Array:
        whole = (size, *a.shape)
        return jnp.broadcast_to(a, whole) if axis is None else jnp.moveaxis(a, axis, 0)

    def behind(pair: Pair) -> Any:
        return tuple(tuple(axis + 1 for axis in of_one) for of_one in pair)

    summed, batch = map(behind, axes)
    batch = tuple((0, *of_one) for of_one in batch)
    fronts = map(in_front, args, mapped)
    return _mixed_dot.bind(*fronts, axes=(summed, batch)), 0


mlir.register_lowering(_mixed_dot, _mixed_lowering)
batching.primitive_batchers[_mixed_dot] = _mixed_vmapped
