"""Chips and slices: the public figures that a plan divides by, each with its document.

Units: bytes, bytes/s and operations/s, in powers of ten unless `GiB` or `MiB` stands there.
Vendors write "GB" for the capacity of a chip's memory and mean GiB (a "16 GB" TPU v5e is 16 * 2**30
bytes to its compiler); their "GB/s" and "TFLOPS" are powers of ten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

MiB = 2**20
GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator chip: peaks that its vendor states, never what a program reaches."""

    name: str
    kind: Literal["tpu", "gpu", "cpu"]
    memory_bytes: int  # as the vendor states it
    # What programs can have of it. TPU: the compiler refuses a program whose arguments, temporaries
    # and code exceed it. GPU: the total that nvidia-smi reports; the driver's context takes some of
    # that, and XLA asks for three quarters of it unless told otherwise.
    usable_bytes: int
    bandwidth: float  # of its memory, bytes/s
    flops: float  # dense bfloat16, FLOP/s; a multiply and an add count as two
    int8_ops: float | None  # dense int8, op/s; None: no public figure
    # Bytes/s that it sends to other chips over all its links together; vendors state twice that,
    # for both directions. A slice smaller than a whole torus uses some of a TPU's links only.
    # None: no links but PCIe.
    link_bandwidth: float | None
    source: str
    devices: int = 1  # JAX devices a chip; they share all of the above equally


_TPUS = (
    # usable_bytes: the largest arguments + code that libtpu 0.0.52 compiled, found by bisection. On
    # a real v6e another version reported 33,550,237,696, which is 4 MB more.
    Chip(
        name="v4",  # two cores, one device: see TOPOLOGY_OPTIONS
        kind="tpu",
        memory_bytes=32 * GiB,
        usable_bytes=33_014_382_080,  # 30.75 GiB
        bandwidth=1200e9,
        flops=275e12,
        int8_ops=275e12,
        link_bandwidth=300e9,  # 6 links of 50e9
        source="docs.cloud.google.com/tpu/docs/v4; links: arXiv 2304.01433, table 4",
    ),
    Chip(
        name="v5e",
        kind="tpu",
        memory_bytes=16 * GiB,
        usable_bytes=16_909_334_016,  # 15.75 GiB
        bandwidth=819e9,
        flops=197e12,
        int8_ops=393e12,
        link_bandwidth=200e9,
        source="docs.cloud.google.com/tpu/docs/v5e",
    ),
    Chip(
        name="v5p",
        kind="tpu",
        memory_bytes=95 * GiB,  # rounded down: of 96 the compiler gives away more than 95
        usable_bytes=102_786_647_040,  # 95.73 GiB
        bandwidth=2765e9,
        flops=459e12,
        int8_ops=918e12,
        link_bandwidth=600e9,
        source="docs.cloud.google.com/tpu/docs/v5p; int8: jax-ml.github.io/scaling-book/tpus",
    ),
    Chip(
        name="v6e",
        kind="tpu",
        memory_bytes=32 * GiB,
        usable_bytes=33_546_038_272,  # 31.24 GiB
        bandwidth=1638e9,
        flops=918e12,
        int8_ops=1836e12,
        link_bandwidth=400e9,
        source="docs.cloud.google.com/tpu/docs/v6e",
    ),
    Chip(
        name="tpu7x",  # Ironwood; the compiler knows no "v7x"
        kind="tpu",
        memory_bytes=192 * GiB,
        usable_bytes=2 * 101_724_429_312,  # 94.74 GiB a device
        bandwidth=7380e9,
        flops=2307e12,
        int8_ops=None,  # the public figure is for float8: 4614e12
        link_bandwidth=600e9,
        source="docs.cloud.google.com/tpu/docs/tpu7x",
        devices=2,
    ),
)
_GPUS = (
    # Dense figures: the data sheets print those with 2:4 sparsity, twice as high, of most of them.
    Chip(
        name="a100-40gb",  # SXM
        kind="gpu",
        memory_bytes=40 * GiB,
        usable_bytes=40960 * MiB,
        bandwidth=1555e9,
        flops=312e12,
        int8_ops=624e12,
        link_bandwidth=300e9,
        source="NVIDIA A100 Tensor Core GPU data sheet",
    ),
    Chip(
        name="a100-80gb",  # SXM
        kind="gpu",
        memory_bytes=80 * GiB,
        usable_bytes=81920 * MiB,
        bandwidth=2039e9,
        flops=312e12,
        int8_ops=624e12,
        link_bandwidth=300e9,
        source="NVIDIA A100 Tensor Core GPU data sheet",
    ),
    Chip(
        name="h100",  # SXM
        kind="gpu",
        memory_bytes=80 * GiB,
        usable_bytes=81559 * MiB,
        bandwidth=3350e9,
        flops=989e12,
        int8_ops=1979e12,
        link_bandwidth=450e9,
        source="NVIDIA H100 Tensor Core GPU data sheet",
    ),
    Chip(
        name="h200",  # SXM
        kind="gpu",
        memory_bytes=141 * GiB,
        usable_bytes=143771 * MiB,
        bandwidth=4800e9,
        flops=989e12,
        int8_ops=1979e12,
        link_bandwidth=450e9,
        source="NVIDIA H200 Tensor Core GPU data sheet",
    ),
    Chip(
        name="b200",  # in HGX, 1,000 W
        kind="gpu",
        memory_bytes=180 * GiB,
        usable_bytes=183359 * MiB,
        bandwidth=8000e9,
        flops=2250e12,
        int8_ops=4500e12,
        link_bandwidth=900e9,
        source="NVIDIA Blackwell architecture technical brief, HGX B200",
    ),
    Chip(
        name="l4",
        kind="gpu",
        memory_bytes=24 * GiB,
        usable_bytes=23034 * MiB,
        bandwidth=300e9,
        flops=121e12,
        int8_ops=242e12,
        link_bandwidth=None,
        source="NVIDIA L4 Tensor Core GPU data sheet",
    ),
    Chip(
        name="l40s",
        kind="gpu",
        memory_bytes=48 * GiB,
        usable_bytes=46068 * MiB,
        bandwidth=864e9,
        flops=362e12,
        int8_ops=733e12,
        link_bandwidth=None,
        source="NVIDIA L40S GPU data sheet",
    ),
    Chip(
        name="a10",
        kind="gpu",
        memory_bytes=24 * GiB,
        usable_bytes=23028 * MiB,
        bandwidth=600e9,
        flops=125e12,
        int8_ops=250e12,
        link_bandwidth=None,
        source="NVIDIA A10 Tensor Core GPU data sheet",
    ),
    Chip(
        name="t4",
        kind="gpu",
        memory_bytes=16 * GiB,
        usable_bytes=15360 * MiB,
        bandwidth=320e9,
        flops=65e12,  # float16: its tensor cores have no bfloat16
        int8_ops=130e12,
        link_bandwidth=None,
        source="NVIDIA T4 Tensor Core GPU data sheet",
    ),
    Chip(
        name="rtx-4090",
        kind="gpu",
        memory_bytes=24 * GiB,
        usable_bytes=24564 * MiB,
        bandwidth=1008e9,
        flops=165.2e12,
        int8_ops=660.6e12,
        link_bandwidth=None,
        source="NVIDIA Ada GPU architecture white paper, appendix A",
    ),
)
CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in (*_TPUS, *_GPUS)})

_TORUS_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TORUS_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
# TPU -> slices, in chips, smallest first: offered by Google Cloud (there are larger ones of three
# dimensions), and compiled for by libtpu 0.0.52. It takes others too; some, such as a side of 0,
# end the process by a signal: ask it for no slice that is not here.
TOPOLOGIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "v4": _TORUS_3D,
        "v5e": _TORUS_2D,
        "v5p": _TORUS_3D,
        "v6e": _TORUS_2D,
        "tpu7x": _TORUS_3D,
    }
)
# Keyword arguments of `get_topology_desc`. A v4 chip is two devices to the compiler, unless told
# that its cores work as one, as they do on Google Cloud; v5p is one device either way.
TOPOLOGY_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"v4": MappingProxyType({"chip_config_name": "megacore"})}
)
