"""`matmul` on TPU: a program fetches a block of quantized weights and widens it in registers.

Letters: M rows of x, I inputs, O outputs, g inputs a group.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Blocks, TpuBlocks, tpu_blocks
from pallas_kernels.dispatch import UnsupportedError
from pallas_kernels.flash_tpu import LANES, block_of

ROWS = 256  # of x a program: enough products a weight to hide its fetch
COLUMNS = 256  # outputs a program that takes all inputs, at least: a matrix unit's width
WIDE = 2048  # outputs a program, at most: float32 sums of ROWS rows fill 2 MiB
VMEM = 32 << 20  # bytes: half of what v5p has, the least of all; float32 products need much of it


class Cut(NamedTuple):
    """What a program takes."""

    rows: int
    inputs: int  # divides I
    outputs: int


class Operands(NamedTuple):
    """What a program reads; None where the call has no such thing."""

    x: Any  # [M,I]
    w: Any  # [I,O] int8, or [I/2,O] uint8
    scale: Any  # [I/g,O] float32
    zero: Any


def matmul_tpu(
    x: jax.Array,  # [M,I]
    w: jax.Array,  # [I,O] int8, or [I/2,O] uint8
    scale: jax.Array,  # [I/g,O] float32
    zero: jax.Array | None,  # [I/g,O] float32
    blocks: Blocks | None,
) -> jax.Array:  # [M,O]
    """See `matmul`."""
    (num_rows, num_inputs), num_outputs = x.shape, w.shape[1]
    cut = cut_of(x, w, len(scale), tpu_blocks(blocks))
    grid = (
        pl.cdiv(num_rows, cut.rows),
        pl.cdiv(num_outputs, cut.outputs),
        num_inputs // cut.inputs,
    )

    def down(array: jax.Array) -> pl.BlockSpec:
        """All of what the inputs of a program have in w, scale or zero."""
        if len(array) == 1:
            return pl.BlockSpec((1, cut.outputs), lambda m, o, i: (0, o))
        return pl.BlockSpec((len(array) // grid[2], cut.outputs), lambda m, o, i: (i, o))

    arrays = Operands(x, w, scale, zero)
    return pl.pallas_call(
        _program,
        grid=grid,
        in_specs=[
            Operands(
                x=pl.BlockSpec((cut.rows, cut.inputs), lambda m, o, i: (m, i)),
                w=down(w),
                scale=down(scale),
                zero=None if zero is None else down(zero),
            )
        ],
        out_specs=pl.BlockSpec((cut.rows, cut.outputs), lambda m, o, i: (m, o)),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_outputs), x.dtype),
        scratch_shapes=[pltpu.VMEM((cut.rows, cut.outputs), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.size * num_outputs,
            bytes_accessed=x.nbytes * (grid[1] if grid[2] > 1 else 1)
            + grid[0] * sum(a.nbytes for a in arrays[1:] if a is not None)
            + num_rows * num_outputs * x.dtype.itemsize,
            transcendentals=0,
        ),
        name="quantized_matmul",
    )(arrays)


def cut_of(x: jax.Array, w: jax.Array, groups: int, blocks: TpuBlocks) -> Cut:
    """How a call is cut: a block of weights has about `weight_bytes` bytes, one of x no more."""
    (num_rows, num_inputs), num_outputs = x.shape, w.shape[1]
    if not num_rows:
        raise UnsupportedError("x has no rows: pallas_tpu takes 1 or more")
    group = num_inputs // groups
    if groups > 1 and group % 8:
        raise UnsupportedError(
            f"scale [{groups},{num_outputs}] is one for {group} of {num_inputs} inputs: pallas_tpu"
            " takes one for a multiple of 8, or for all"
        )
    weights = blocks.weight_bytes * num_inputs // len(w)  # numbers a block
    numbers = blocks.weight_bytes // x.dtype.itemsize  # of x, a block
    rows, inputs = min(num_rows, ROWS), num_inputs
    if inputs * min(COLUMNS, num_outputs) > weights or inputs * rows > numbers:
        # x is cut at tiles of 128 inputs, scales at tiles of 8 groups. Every block of outputs then
        # fetches x again, so they are wide.
        tile = LANES if groups == 1 else math.lcm(LANES, 8 * group)
        most = min(weights // min(WIDE, num_outputs), numbers // rows)
        inputs = block_of(num_inputs, max(most, tile), tile) or num_inputs
        if inputs * LANES > 4 * weights:
            raise UnsupportedError(
                f"x [...,{inputs}], {groups} groups of inputs: pallas_tpu takes multiples of {tile}"
                f" inputs, or at most {4 * weights // LANES}"
            )
    rows = min(rows, max(numbers // inputs // 16 * 16, 16))
    outputs = min(max(weights // inputs // LANES * LANES, LANES), WIDE)
    # Cores share the blocks of outputs, so there are as many where they have a tile each.
    count = max(pl.cdiv(num_outputs, outputs), min(blocks.cores, num_outputs // LANES))
    if count == 1:
        return Cut(rows, inputs, num_outputs)
    return Cut(rows, inputs, pl.cdiv(pl.cdiv(num_outputs, count), LANES) * LANES)


def _program(arrays: Operands, out: Any, total: Any) -> None:
    """Add what a block of inputs gives to `total` [rows,outputs] float32."""
    x, w, scale, zero = arrays
    rows, inputs = x.shape
    size = inputs // len(scale)  # inputs of a group within the block

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, jnp.float32)

    def group(n: int) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Its weights [size,outputs] as they are stored, its scale and zero [1,outputs]."""
        first, count = (at * w.shape[0] // inputs for at in (n * size, size))
        stored = w[first : first + count]
        if w.dtype == jnp.uint8:  # a byte is two rows, its low bits the first
            stored = pltpu.bitcast(stored, jnp.int4)
        return stored, scale[n : n + 1], None if zero is None else zero[n : n + 1]

    # A scale multiplies whatever is fewer: the weights of its group, or the sums they go into.
    if rows < size:
        for n in range(len(scale)):
            stored, factor, nought = group(n)
            part = x[:, n * size : (n + 1) * size]
            sums = _dot(part, stored.astype(x.dtype))
            if nought is not None:
                sums -= jnp.sum(part.astype(jnp.float32), axis=1, keepdims=True) * nought
            total[...] += sums * factor
    else:
        pieces = []
        for n in range(len(scale)):
            stored, factor, nought = group(n)
            numbers = stored.astype(jnp.float32)
            pieces.append((numbers if nought is None else numbers - nought) * factor)
        total[...] += _dot(x[...], jnp.concatenate(pieces).astype(x.dtype))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot(
        a,
        b,
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
