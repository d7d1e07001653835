"""Block sizes a chip. An entry says whether it was measured or derived, and from what."""

from __future__ import annotations

from typing import NamedTuple

import jax


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
    "v5p": TpuBlocks(2 << 20, 512, 512, 2 << 20, 1, "derived: 2765 GB/s x 1.4 us / 2"),
}
_KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e"}
_KINDS |= {"TPU v5": "v5p", "TPU v5p": "v5p"}


def tpu_blocks(blocks: TpuBlocks | None) -> TpuBlocks:
    """`blocks`, or this machine's TPU's, or v5e's, the smallest, where there is none."""
    if blocks is not None:
        return blocks
    return TPU[_KINDS.get(jax.devices()[0].device_kind, "v5e")]
