"""How much memory there is, asked before it is taken."""

from __future__ import annotations

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


def require(needed: int, what: str, advice: str, devices: list[jax.Device]) -> None:
    """Raise OutOfMemory unless `needed` bytes, spread over `devices`, are there."""
    if {d.platform for d in devices} == {"cpu"}:
        available = available_bytes(devices[0])  # virtual devices share the host's memory
    else:
        available = sum(available_bytes(d) for d in devices)
    if needed > available:
        raise OutOfMemory(
            f"{what} needs {needed:,} bytes and {available:,} are available: {advice}"
        )
