"""Rotary position embedding (arXiv 2104.09864) on paired halves of H, and its scalings."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import Rope


def frequencies(rope: Rope) -> np.ndarray:
    """Angle in radians by which each channel pair turns a token: [dim/2] float32.

    Scalings: linear (arXiv 2306.15595) divides all of them; llama3 (Llama 3.1 model card) divides
    the slow ones and blends between; yarn (arXiv 2309.00071) does so by a ramp over channels;
    "factors" divides by the numbers that the checkpoint carries.
    """
    exponent = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    freq: np.ndarray = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.scaling == "linear":
        freq = freq / np.float32(rope.factor)
    elif rope.scaling == "llama3":
        freq = _llama3(freq, rope)
    elif rope.scaling == "yarn":
        freq = _yarn(freq, rope)
    elif rope.scaling == "factors":
        freq = freq / np.asarray(rope.factors, np.float32)
    return freq.astype(np.float32)


def _llama3(freq: np.ndarray, rope: Rope) -> np.ndarray:
    turns = rope.original_max_len * freq / (2 * math.pi)  # turns within the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(smooth, 0.0, 1.0)  # 1: fast channel, untouched; 0: slow channel, stretched
    return keep * freq + (1.0 - keep) * freq / rope.factor


def _yarn(freq: np.ndarray, rope: Rope) -> np.ndarray:
    def channel(turns: float) -> float:
        """The channel pair that makes `turns` turns within the original context."""
        wavelengths = rope.original_max_len / (turns * 2 * math.pi)
        return rope.dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = max(high - low, 0.001)  # a ramp of no width would divide by zero
    keep = 1.0 - np.clip((np.arange(rope.dim // 2) - low) / width, 0.0, 1.0)
    return keep * freq + (1.0 - keep) * freq / rope.factor


def tables(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines at `positions` [B,T] int32, B or one: two arrays [B,T,1,dim/2] float32."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(rope)
    # 1.0 but for yarn, where it sharpens the attention of a stretched context.
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the leading channels of `x` [B,T,N,H]; channel i pairs with i + dim/2."""
    half = cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
    return turned.astype(x.dtype)
