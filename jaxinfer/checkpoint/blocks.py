"""GGUF's quantized blocks as codes and scales, instead of the numbers that they stand for.

Codes and scales are those of the file, which `gguf.quants` multiplies into floats. Codes of five
and six bits are kept in eight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxinfer.quantize import Scheme


class Blocks(NamedTuple):
    """Rows of a matrix, g inputs a group."""

    codes: np.ndarray  # [rows,I] int8
    scale: np.ndarray  # [rows,I/g] of the scheme's scale_dtype
    offset: np.ndarray | None  # as scale


@dataclasses.dataclass(frozen=True)
class Format:
    """One of GGUF's types."""

    scheme: Scheme
    split: Callable[[np.ndarray], Blocks]  # uint8 [n, bytes of a block] -> of n rows of a block


def _half(raw: np.ndarray) -> np.ndarray:
    """Two bytes a number [n,2k] as float16 [n,k]."""
    return np.ascontiguousarray(raw).view("<f2")


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """Bytes [n,16] as numbers 0 to 15 [n,32]: low halves, then high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=1)


def _fifth(raw: np.ndarray) -> np.ndarray:
    """32 bits [n,4] as 0 or 16 [n,32]."""
    return np.unpackbits(raw, axis=1, bitorder="little") << 4


def _q8_0(raw: np.ndarray) -> Blocks:
    return Blocks(raw[:, 2:].view(np.int8), _half(raw[:, :2]), None)


def _q4_0(raw: np.ndarray) -> Blocks:
    return Blocks(_nibbles(raw[:, 2:]).view(np.int8) - np.int8(8), _half(raw[:, :2]), None)


def _q5_0(raw: np.ndarray) -> Blocks:
    codes = (_nibbles(raw[:, 6:]) | _fifth(raw[:, 2:6])).view(np.int8)
    return Blocks(codes - np.int8(16), _half(raw[:, :2]), None)


def _q4_1(raw: np.ndarray) -> Blocks:
    codes = _nibbles(raw[:, 4:]).view(np.int8) - np.int8(8)
    return Blocks(codes, _half(raw[:, :2]), _half(raw[:, 2:4]))


def _q5_1(raw: np.ndarray) -> Blocks:
    codes = _nibbles(raw[:, 8:]) | _fifth(raw[:, 4:8])
    return Blocks(_least_first(codes), _half(raw[:, :2]), _half(raw[:, 2:4]))


def _least_first(codes: np.ndarray) -> np.ndarray:
    """Numbers from 0 on, uint8, as codes of eight bits with zero points."""
    return (codes ^ 128).view(np.int8)


def _k_scales(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The six-bit scales and mins [n,8] of a K block, f32, from its first 16 bytes."""
    whole = _half(raw[:, :4]).astype(np.float32)  # [n,2], of scales and of mins
    a, b, c = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = np.concatenate([a & 63, (c & 15) | (a >> 6) << 4], axis=1)
    mins = np.concatenate([b & 63, (c >> 4) | (b >> 6) << 4], axis=1)
    return whole[:, :1] * scales, whole[:, 1:] * mins


def _q4_k(raw: np.ndarray) -> Blocks:
    scale, least = _k_scales(raw)
    pairs = raw[:, 16:].reshape(-1, 4, 32)  # low halves are one group, high ones the next
    codes = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(-1, 256)
    return Blocks(codes.view(np.int8) - np.int8(8), scale, -least)


def _q5_k(raw: np.ndarray) -> Blocks:
    scale, least = _k_scales(raw)
    pairs = raw[:, 48:].reshape(-1, 4, 32)
    codes = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    bits = np.unpackbits(raw[:, 16:48, None], axis=2, bitorder="little")  # [n,32,8]
    codes |= bits.swapaxes(1, 2) << 4
    return Blocks(_least_first(codes.reshape(-1, 256)), scale, -least)


def _q6_k(raw: np.ndarray) -> Blocks:
    low = raw[:, :128].reshape(-1, 2, 2, 32)  # halves of the block
    high = raw[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], axis=2)  # [n,2,4,32]
    upper = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (low | upper << 4).reshape(-1, 256).view(np.int8) - np.int8(32)
    scale = _half(raw[:, 208:210]).astype(np.float32) * raw[:, 192:208].view(np.int8)
    return Blocks(codes, scale, None)


def _scheme(bits: int, group: int, zero: bool, scale_dtype: str) -> Scheme:
    return Scheme(bits=bits, group=group, zero=zero, scale_dtype=scale_dtype)


# Scales that are products have more bits than float16.
FORMATS = {
    "Q8_0": Format(_scheme(8, 32, False, "float16"), _q8_0),
    "Q4_0": Format(_scheme(4, 32, False, "float16"), _q4_0),
    "Q4_1": Format(_scheme(4, 32, True, "float16"), _q4_1),
    "Q5_0": Format(_scheme(8, 32, False, "float16"), _q5_0),
    "Q5_1": Format(_scheme(8, 32, True, "float16"), _q5_1),
    "Q4_K": Format(_scheme(4, 32, True, "float32"), _q4_k),
    "Q5_K": Format(_scheme(8, 32, True, "float32"), _q5_k),
    "Q6_K": Format(_scheme(8, 16, False, "float32"), _q6_k),
}
