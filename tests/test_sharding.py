"""Runs `eight_devices.py` where there are eight devices: in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.errors import InvalidArgument
from jaxinfer.sharding import make_mesh


def run_there(marked: str) -> str:
    """Closing lines of pytest over that file; they name what failed."""
    file = str(Path(__file__).with_name("eight_devices.py"))
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-m", marked, file]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-4000:]
    return out.stdout


def test_on_eight_devices():
    assert " passed" in run_there("not slow")


@pytest.mark.slow
def test_on_every_mesh():
    assert " passed" in run_there("slow")


def test_a_mesh_larger_than_the_devices_is_refused():
    with pytest.raises(InvalidArgument, match="needs 64 devices, not 1"):
        make_mesh(model=64)
