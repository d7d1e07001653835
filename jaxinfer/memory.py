"""How much memory there is, asked before it is taken."""

from __future__ import annotations

import jax
import psutil

from jaxinfer.errors import OutOfMemory


def available_bytes(device: jax.Device) -> int:
    """Bytes that can still be allocated on `device`: of its own memory, or of the host's."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return int(psutil.virtual_memory().available)


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
