"""Public entry of `matmul`: checks its arguments and picks a backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.chips import Blocks
from pallas_kernels.dispatch import Impl, UnsupportedError
from pallas_kernels.matmul.reference import matmul_reference


def matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    *,
    zero: jax.Array | None = None,
    impl: Impl = "auto",
    blocks: Blocks | None = None,
) -> jax.Array:
    """x @ ((w - zero) * scale), with quantized weights that a pallas backend reads as they are.

    I inputs fall into groups of g neighbours; a group has a scale for every one of the O outputs.
    The groups follow from the shape of `scale`: one of [1,O] is a scale an output.

    Args:
      x: [...,I] bfloat16 or float32.
      w: int8 [I,O], or int4 as uint8 [I/2,O]: byte (i,o) holds weight (2i,o) in its low four bits
        and (2i+1,o) in its high ones, two's complement, -8 to 7.
      scale: [I/g,O] float32.
      zero: [I/g,O] float32, which number stands for 0; None: 0 does.
      impl: "xla" is the reference, "pallas_tpu" never gives way to it, "auto" takes the platform's
        own where it covers the arguments.
      blocks: instead of the chip's entry in `pallas_kernels.chips`.

    Returns:
      [...,O] in the dtype of x, added up in float32. "xla" rounds (w - zero) * scale to the dtype
      of x; "pallas_tpu" does so only where a group has no more inputs than x has rows, and else
      multiplies the sums of whole numbers, which is more exact.

    Raises:
      UnsupportedError: shapes or dtypes that do not fit together, or that `impl` does not cover.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(f"x is {x.dtype}: matmul takes bfloat16 and float32")
    if w.dtype not in (jnp.int8, jnp.uint8):
        raise UnsupportedError(f"w is {w.dtype}: matmul takes int8, or pairs of int4 as uint8")
    if w.ndim != 2 or not w.size:
        raise UnsupportedError(f"w {w.shape} must be [I,O] of int8, or [I/2,O] of uint8")
    inputs, outputs = w.shape[0] * (2 if w.dtype == jnp.uint8 else 1), w.shape[1]
    if x.shape[-1:] != (inputs,):
        raise UnsupportedError(f"x {x.shape} must be [...,{inputs}]: w is {w.dtype} {w.shape}")
    if (
        scale.ndim != 2
        or scale.shape[1] != outputs
        or inputs % max(len(scale), 1)
        or not scale.size
    ):
        raise UnsupportedError(
            f"scale {scale.shape} must be [groups,{outputs}], and the groups divide {inputs} inputs"
        )
    for name, given in (("scale", scale), ("zero", zero)):
        if given is not None and (given.shape != scale.shape or given.dtype != jnp.float32):
            raise UnsupportedError(
                f"{name} {given.dtype} {given.shape} must be float32 {scale.shape}"
            )
    rows = x.reshape(-1, inputs)

    def xla() -> jax.Array:
        return matmul_reference(rows, w, scale, zero)

    def pallas_tpu() -> jax.Array:
        from pallas_kernels.matmul.tpu import matmul_tpu

        return matmul_tpu(rows, w, scale, zero, blocks)

    y = dispatch.run("matmul", impl, {"xla": xla, "pallas_tpu": pallas_tpu})
    return y.reshape(*x.shape[:-1], outputs)
