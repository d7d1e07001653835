"""Block sizes a chip. An entry says whether it was measured or derived, and from what."""

from __future__ import annotations

from typing import NamedTuple

import jax

from pallas_kernels.dispatch import UnsupportedError


class TpuBlocks(NamedTuple):
    """How a TPU kernel cuts its work; pass one as `blocks=` to override the table."""

    kv_bytes: int  # of keys a program fetches at a time when decoding; as many of values
    query_rows: int  # tokens x query heads a kv head, a program of a prefill
    prefill_keys: int  # key slots a program of a prefill fetches at a time
    weight_bytes: int  # of a weight matrix a program fetches at a time
    cores: int  # TensorCores that share a kernel's programs
    source: str


# A grid step costs about 0.35 us whatever it does (Pallas' own guide), so a decode step fetches
# what takes at least four times as long at the chip's bandwidth: keys and values, half each, but
# twice that (double buffering) stays in half of the 16 MiB that a kernel gets by default.
# Prefill: 512 x 512 scores in float32 are 1 MiB; their two products take several steps' overhead.
TPU: dict[str, TpuBlocks] = {
    "v5e": TpuBlocks(1 << 19, 512, 512, 1 << 20, 1, "derived: 819 GB/s x 1.4 us / 2"),
    "v6e": TpuBlocks(1 << 20, 512, 512, 2 << 20, 1, "derived: 1640 GB/s x 1.4 us / 2"),
    "v5p": TpuBlocks(2 << 20, 512, 512, 2 << 20, 2, "derived: 2765 GB/s x 1.4 us / 2"),
}
_KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e"}
_KINDS |= {"TPU v5": "v5p", "TPU v5p": "v5p"}


class GpuBlocks(NamedTuple):
    """How a GPU kernel cuts its work; pass one as `blocks=` to override the table."""

    prefill_keys: int  # key slots a block of a prefill, 64 or 128; half of it where H > 128
    decode_keys: int  # key slots a block when decoding, a multiple of 64
    multiprocessors: int  # of the card: that many programs run at a time
    source: str


# Prefill: the blocks of FlashAttention-3 at H = 128. Decoding: 64 keys and values of H = 128 take
# 1.3 us at a multiprocessor's share of 3.35 TB/s, and their arithmetic about half of that.
HOPPER = GpuBlocks(128, 64, 132, "derived: H100 and H200 SXM, 132 multiprocessors")

Blocks = TpuBlocks | GpuBlocks


def tpu_blocks(blocks: Blocks | None) -> TpuBlocks:
    """`blocks`, or this machine's TPU's, or v5e's, the smallest, where there is none."""
    if blocks is None:
        return TPU[_KINDS.get(jax.devices()[0].device_kind, "v5e")]
    if not isinstance(blocks, TpuBlocks):
        raise UnsupportedError(f"blocks={blocks}: pallas_tpu takes TpuBlocks")
    return blocks


def gpu_blocks(blocks: Blocks | None) -> GpuBlocks:
    """`blocks`, or Hopper's."""
    if not isinstance(blocks, GpuBlocks | None):
        raise UnsupportedError(f"blocks={blocks}: pallas_gpu takes GpuBlocks")
    return blocks or HOPPER
