"""Quantized weights: an array type, and the products that hide it from the model.

A weight is a plain array or a `Quantized`; `project`, `lookup` and `scores` take either, so no
layer asks which it has. A weight is code * scale, with a scale an output channel or one for each
group of neighbouring inputs; with zero points it is (code - least code) * scale + offset. Codes lie
[G,O,I], inputs last, several in a byte where they have fewer than eight bits. (Not as `QArray` of
qwix has them, elements of int4: XLA:CPU, in jax 0.10, compiles no product of those.)

Letters: O outputs, I inputs of a group, G groups, p = 8 / bits codes a byte; R rows of a product.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxinfer.xla import outlined
from pallas_kernels.digits import split
from pallas_kernels.whole_dot import whole_dot

FP8 = jnp.float8_e4m3fn
# Of a product by digits where a weight lies in groups; for more it is widened. With 8 rows of int4
# that takes 0.56 of the time on a core with AVX-512, with 16 0.93, with 64 2.0.
FEW_ROWS = 8
CLIPS = 16  # scales that rounding to few bits tries: 1.2, 1.16, ... 0.6 of what holds just all


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a matrix is kept, and how it is multiplied with; static."""

    bits: int = 8  # 8, 4 or 2
    group: int | None = None  # inputs that share a scale; None: all of them
    zero: bool = False  # with an offset: codes span least to most, not -most to most
    fp8: bool = False  # codes are e4m3 numbers (arXiv 2209.05433)
    scale_dtype: str = "float32"  # bfloat16 where there are many
    digits: int = 0
    """How an activation enters a product: 0, as the float that it is; 1, rounded to int8 with a
    scale a token (arXiv 2206.01861); 2, as two int8 numbers, which together hold 15 bits. Whole
    numbers are what XLA:CPU multiplies fast."""
    outlined: bool = False
    """Whether a product is a routine of its own, which XLA cannot begin before its activation is
    there. Weights are there from the beginning, and XLA:CPU unpacks those of all layers first: for
    256 tokens of SmolLM2 in int4 that held 423 MB, where one matrix after the other holds 13."""

    @property
    def in_byte(self) -> int:
        """p, codes in a byte."""
        return 8 // self.bits

    def groups(self, inputs: int) -> int:
        """G, of a matrix with so many inputs."""
        return inputs // (self.group or inputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight in few bits."""

    # [G,O/p,I] int8, or fp8. A byte holds neighbouring outputs, the first in its low bits: of a
    # code c of b bits it holds c + 2^(b-1), and the byte as a whole is less 128.
    values: jax.Array
    scale: jax.Array  # [G,O] of the scheme's scale_dtype
    offset: jax.Array | None  # [G,O] as the scale: what the least code stands for
    scheme: Scheme = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of the weight
    inputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # its axes summed over
    dtype: Any = dataclasses.field(metadata={"static": True})  # that it stands for

    @property
    def out(self) -> tuple[int, ...]:
        """Sizes of the axes that no product sums over."""
        return tuple(n for i, n in enumerate(self.shape) if i not in self.inputs)


Weight: TypeAlias = jax.Array | Quantized


def quantize(w: jax.Array, inputs: tuple[int, ...], scheme: Scheme) -> Quantized:
    """`w` rounded to nearest.

    Args:
      w: a weight of which a product sums over the axes `inputs`.
      inputs: neighbouring axes; a group is among neighbours of the last, first of them slowest.
      scheme: its group divides the number of inputs, and its codes a byte that of the outputs.
    """
    x = to_groups(w.astype(jnp.float32), inputs, scheme)
    scale, offset = find_scale(x, scheme)
    codes = encode(x, scale, offset, scheme)
    return Quantized(pack(codes, scheme), scale, offset, scheme, w.shape, inputs, w.dtype)


def to_groups(w: jax.Array, inputs: tuple[int, ...], scheme: Scheme) -> jax.Array:
    """A weight as [G,O,I]."""
    rest = [i for i in range(w.ndim) if i not in inputs]
    count = math.prod(w.shape[i] for i in inputs)
    x = jnp.transpose(w, (*rest, *inputs)).reshape(-1, scheme.groups(count), scheme.group or count)
    return jnp.moveaxis(x, 1, 0)


def from_groups(x: jax.Array, shape: tuple[int, ...], inputs: tuple[int, ...]) -> jax.Array:
    """The weight of this shape that `to_groups` made into x [G,O,I]."""
    rest = [i for i in range(len(shape)) if i not in inputs]
    order = (*rest, *inputs)
    whole = jnp.moveaxis(x, 0, 1).reshape([shape[i] for i in order])
    return jnp.transpose(whole, [order.index(i) for i in range(len(shape))])


def find_scale(
    x: jax.Array, scheme: Scheme, weight: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Scale and offset [G,O] of groups [G,O,I] f32.

    Eight bits hold the largest weight. With fewer, a scale that cuts off the largest may round the
    others so much better that the sum of squares falls. `CLIPS` scales are tried, and after each
    the scale and offset that fit its codes best (least squares); the best of all is taken.

    Args:
      x: weights.
      scheme: how they will be kept.
      weight: [G,1,I], how much the square of an input's error counts; None: all the same.
    """
    kind = jnp.dtype(scheme.scale_dtype)
    if scheme.fp8:
        most = jnp.max(jnp.abs(x), axis=-1)
        return _positive(most / float(jnp.finfo(FP8).max)).astype(kind), None
    half = 1 << (scheme.bits - 1)
    low, high = jnp.minimum(x.min(-1), 0), jnp.maximum(x.max(-1), 0)

    def at(shrink: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        if not scheme.zero:
            return _positive(shrink * jnp.maximum(-low, high) / (half - 1)).astype(kind), None
        scale = _positive(shrink * (high - low) / (2 * half - 1)).astype(kind)
        return scale, (shrink * low).astype(kind)

    if scheme.bits == 8:
        return at(jnp.float32(1))
    counts = jnp.ones((1, 1, x.shape[-1])) if weight is None else weight

    def error(scale: jax.Array, offset: jax.Array | None) -> jax.Array:
        rounded = decode(encode(x, scale, offset, scheme), scale, offset, scheme)
        return jnp.sum(counts * (rounded - x) ** 2, axis=-1)

    def better(i: jax.Array, found: tuple[Any, ...]) -> tuple[Any, ...]:
        tried = _fit(x, encode(x, *at(1.2 - 0.04 * i), scheme), counts, scheme)
        least = error(*tried)
        # Not where it is no number, since all codes were the same, and not where one weight counts
        # for so much that float32 has no digits left for the slope of the others.
        won = (least < found[0]) & (tried[0] > 0)
        return jax.tree.map(lambda a, b: jnp.where(won, a, b), (least, tried), found)

    whole = at(jnp.float32(1))
    return jax.lax.fori_loop(0, CLIPS, better, (error(*whole), whole))[1]


def _fit(
    x: jax.Array, codes: jax.Array, counts: jax.Array, scheme: Scheme
) -> tuple[jax.Array, jax.Array | None]:
    """Scale and offset [G,O] with which codes [G,O,I] are nearest to x, squares weighted."""
    kind = jnp.dtype(scheme.scale_dtype)

    def mean(y: jax.Array) -> jax.Array:
        return jnp.sum(counts * y, axis=-1) / jnp.sum(counts, axis=-1)

    c = codes.astype(jnp.float32)
    if not scheme.zero:
        return (mean(c * x) / mean(c * c)).astype(kind), None
    around = c - mean(c)[..., None]
    scale = (mean(around * x) / mean(around * around)).astype(kind)
    least = mean(c) + (1 << (scheme.bits - 1))  # codes between the mean and the least
    return scale, (mean(x) - least * scale.astype(jnp.float32)).astype(kind)


def _positive(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, 1, scale)  # of a group of zeros


def encode(x: jax.Array, scale: jax.Array, offset: jax.Array | None, scheme: Scheme) -> jax.Array:
    """Codes [...,I] nearest to x [...,I] f32, with scale and offset [...]: int8, or fp8."""
    x = (x - _middle(scale, offset, scheme)[..., None]) / scale.astype(jnp.float32)[..., None]
    if scheme.fp8:
        most = float(jnp.finfo(FP8).max)
        return jnp.clip(x, -most, most).astype(FP8)
    half = 1 << (scheme.bits - 1)
    least = -half if scheme.zero or scheme.bits < 8 else 1 - half
    return jnp.clip(jnp.round(x), least, half - 1).astype(jnp.int8)


def decode(
    codes: jax.Array, scale: jax.Array, offset: jax.Array | None, scheme: Scheme
) -> jax.Array:
    """The weights [...,I] f32 of codes [...,I], with scale and offset [...]."""
    x = codes.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]
    return x if offset is None else x + _middle(scale, offset, scheme)[..., None]


def _middle(scale: jax.Array, offset: jax.Array | None, scheme: Scheme) -> jax.Array:
    """What code 0 stands for, f32 as the scale."""
    scale = scale.astype(jnp.float32)
    if offset is None:
        return jnp.zeros_like(scale)
    return offset.astype(jnp.float32) + (1 << (scheme.bits - 1)) * scale


def pack(codes: jax.Array, scheme: Scheme) -> jax.Array:
    """Codes [G,O,I] as bytes [G,O/p,I]."""
    p, bits = scheme.in_byte, scheme.bits
    if p == 1:
        return codes
    g, o, i = codes.shape
    parts = codes.reshape(g, o // p, p, i).astype(jnp.uint8) + jnp.uint8(1 << (bits - 1))
    byte = parts[:, :, 0]
    for k in range(1, p):
        byte |= parts[:, :, k] << (bits * k)
    return jax.lax.bitcast_convert_type(byte ^ 128, jnp.int8)


def unpack(values: jax.Array, scheme: Scheme) -> jax.Array:
    """Bytes [G,O/p,I] as codes [G,O,I]."""
    if scheme.in_byte == 1:
        return values
    places = scheme.bits * jnp.arange(scheme.in_byte)[:, None]
    codes = _code(values[:, :, None], places, scheme.bits)
    return codes.reshape(len(values), -1, values.shape[-1])


def _code(byte: jax.Array, place: jax.Array, bits: int) -> jax.Array:
    """The code int8 that lies in a byte from this bit on."""
    mask, half = (1 << bits) - 1, 1 << (bits - 1)
    return ((((byte.astype(jnp.int32) + 128) >> place) & mask) - half).astype(jnp.int8)


def widen(w: Quantized) -> jax.Array:
    """The weight that it stands for, f32 in its own shape."""
    x = decode(unpack(w.values, w.scheme), w.scale, w.offset, w.scheme)
    return from_groups(x, w.shape, w.inputs)


def project(x: jax.Array, w: Weight, num_in: int = 1) -> jax.Array:
    """x [B,T,*in] times w [*in,*out] -> [B,T,*out] float32."""
    if isinstance(w, Quantized):
        rows = x.reshape(*x.shape[: x.ndim - num_in], -1)
        return _product(rows, w).reshape(*rows.shape[:-1], *w.out)
    dims = tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in))
    return _dot(x, w, dims)


def lookup(table: Weight, tokens: jax.Array) -> jax.Array:
    """Rows [*tokens,D] of a table [V,D]."""
    if not isinstance(table, Quantized):
        return table[tokens]
    p = table.scheme.in_byte
    codes = table.values[:, tokens // p]  # [G,*tokens,I]
    if p > 1:
        codes = _code(codes, table.scheme.bits * (tokens % p)[..., None], table.scheme.bits)
    offset = None if table.offset is None else table.offset[:, tokens]
    rows = decode(codes, table.scale[:, tokens], offset, table.scheme)
    return jnp.moveaxis(rows, 0, -2).reshape(*tokens.shape, -1).astype(table.dtype)


def scores(table: Weight, x: jax.Array) -> jax.Array:
    """Product [B,T,V] float32 of every row of a table [V,D] with x [B,T,D]."""
    if isinstance(table, Quantized):
        return _product(x, table)
    # Weight first: eight rows take XLA:CPU a fifth less time than the other way round.
    return jnp.moveaxis(_dot(table, x, ((1,), (2,))), 0, -1)


def _dot(a: jax.Array, b: jax.Array, contract: Any) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _product(x: jax.Array, w: Quantized) -> jax.Array:
    """x [B,T,G*I] times a weight, [B,T,O] float32."""
    groups, _, size = w.values.shape
    rows = x.reshape(-1, groups, size)  # [R,G,I]
    few = len(rows) <= FEW_ROWS or groups == 1 or w.scheme.digits == 1  # one is not the float
    if w.scheme.digits and few:
        *digits, unit = split(rows.astype(jnp.float32), (1, 2))
        stacked = jnp.concatenate(digits[: w.scheme.digits])
        y = _call(_by_digits, stacked, w) * unit[:, 0]
    else:
        y = _call(_by_floats, rows, w)
    return y.reshape(*x.shape[:2], -1)


def _call(
    product: Callable[[jax.Array, Quantized], jax.Array], x: jax.Array, w: Quantized
) -> jax.Array:
    """product(x, w), outlined where the scheme says so."""
    if not w.scheme.outlined:
        return product(x, w)
    return outlined(product, x, w)


def _by_floats(x: jax.Array, w: Quantized) -> jax.Array:
    """x [R,G,I] times a weight that is widened to the dtype of x: [R,O]."""
    codes = unpack(w.values, w.scheme)
    if len(codes) == 1 and w.offset is None:  # the scale can wait for the sum
        return _dot(x[:, 0], codes[0].astype(x.dtype), ((1,), (1,))) * w.scale[0]
    whole = decode(codes, w.scale, w.offset, w.scheme).astype(x.dtype)
    return _dot(x, whole, ((1, 2), (0, 2)))


def _by_digits(x: jax.Array, w: Quantized) -> jax.Array:
    """x [n*R,G,I] int8, n digits of activations, times a weight: [R,O] f32, in their units.

    A product with a digit is exact. Those of the second digit are the rows behind, so that both
    are one product.
    """

    def joined(y: jax.Array) -> jax.Array:  # [G,n*R,O] -> [G,R,O] f32
        y = y.astype(jnp.float32)
        if w.scheme.digits == 1:
            return y
        first, second = jnp.split(y, 2, axis=1)
        return first + second / 254

    p = w.scheme.in_byte
    parts = [
        _sum_groups(joined(y) * w.scale[:, None, k::p]) for k, y in enumerate(_whole_products(x, w))
    ]
    y = jnp.stack(parts, axis=-1).reshape(len(parts[0]), -1)
    if w.offset is not None:  # it is added to every weight: times the sum of a group's inputs
        sums = jnp.sum(x, axis=2, dtype=jnp.int32).astype(jnp.float32)  # [n*R,G]
        y += joined(_dot(sums, _middle(w.scale, w.offset, w.scheme), ((1,), (0,)))[None])[0]
    return y


def _sum_groups(y: jax.Array) -> jax.Array:
    """The sum over G of [G,R,O] f32: [R,O].

    As a product with ones, in two rows: XLA:CPU's reduction takes six times as long, and a product
    with one row half as long again to compile.
    """
    if len(y) == 1:
        return y[0]
    ones = jnp.ones((y.shape[1], 2, len(y)), y.dtype)
    dims = ((2,), (0,)), ((0,), (1,))
    return jax.lax.dot_general(ones, y, dims, jax.lax.Precision.HIGHEST)[:, 0]


def _whole_products(x: jax.Array, w: Quantized) -> list[jax.Array]:
    """p sums [G,R,O/p] i32 of x [R,G,I] int8 times the first code of each byte, the second, ...

    A byte is the sum of its codes times powers of two, and so is its product. Bytes with the upper
    codes masked away give the sums of the lower ones, which are taken off.
    """
    p, bits = w.scheme.in_byte, w.scheme.bits

    def times(values: jax.Array) -> jax.Array:  # [G,O/p,I] -> [G,R,O/p]
        if len(values) == 1:  # XLA:CPU is slow with a batch of one
            return whole_dot(x[:, 0], values[0], (((1,), (1,)), ((), ())))[None]
        # Over 32 inputs whole_dot gains nothing: with VNNI 0.8 to 1.1 of the time for two rows, 1.1
        # to 1.8 for sixteen.
        dims = ((2,), (2,)), ((1,), (0,))
        return jax.lax.dot_general(x, values, dims, preferred_element_type=jnp.int32)

    if p == 1:
        return [times(w.values)]
    half = (1 << (bits - 1)) * jnp.sum(x.astype(jnp.int32), axis=2).T[..., None]  # [G,R,1]
    parts, below = [], jnp.zeros((), jnp.int32)
    for k in range(1, p + 1):
        # The top code lies in its byte without the half that the others are raised by.
        upto = times(w.values if k == p else _low_bits(w.values, bits * k))
        part = (upto - below) >> (bits * (k - 1))
        parts.append(part if k == p else part - half)
        below = upto
    return parts


def _low_bits(values: jax.Array, count: int) -> jax.Array:
    """The lowest `count` bits of each byte of [G,O/p,I] int8.

    A loop over 32 bytes XLA:CPU unrolls and does byte by byte, over many it does as vectors, in a
    third of the time. So that they stay many, what masks them must not be fused with the reshape.
    """
    mask = jnp.int8((1 << count) - 1)
    flat = outlined(jnp.bitwise_and, values.reshape(len(values), -1), mask)
    return flat.reshape(values.shape)
