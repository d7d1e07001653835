"""How much memory there is, asked before it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import psutil

from jaxinfer.errors import OutOfMemory


def available_bytes(device: jax.Device) -> int:
    """Bytes that can still be allocated on `device`: of its own memory, or of the host's."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    host = int(psutil.virtual_memory().available)
    return min(host, container_bytes(Path("/sys/fs/cgroup"), host))


def container_bytes(group: Path, unlimited: int) -> int:
    """What a container's control group (Linux, version 2) still allows, else `unlimited`."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        detail = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
        # Pages of files that were read count as used, and are given back when they are needed.
        return max(0, limit - used + int(detail["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no such group, or memory.max says "max"
        return unlimited


def require(needed: int, what: str, advice: str, devices: Sequence[jax.Device]) -> None:
    """Raise OutOfMemory unless `needed` bytes are there on each of `devices` that this process has.

    Virtual devices of a CPU share the host's memory.
    """
    own = [d for d in devices if d.process_index == jax.process_index()]
    if {d.platform for d in own} == {"cpu"}:
        needed, available, each = needed * len(own), available_bytes(own[0]), ""
    else:
        available, each = min(map(available_bytes, own)), " a device" if len(own) > 1 else ""
    if needed > available:
        raise OutOfMemory(
            f"{what} needs {needed:,} bytes{each} and {available:,} are available: {advice}"
        )
