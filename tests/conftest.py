"""Fixtures shared by the tests: the two real models, fetched once into the jaxinfer cache."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_end_with_their_file() -> Iterator[None]:
    """Every program that XLA:CPU holds is a few mapped regions of memory, of which Linux gives a
    process 65,530; the programs of all test files together need more, and the process aborts. What
    they took glibc keeps, gigabytes after a few files, unless it is told to give it back."""
    yield
    jax.clear_caches()
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """Path of SmolLM2-135M-Instruct as a GGUF file."""
    from jaxinfer.checkpoint import hub

    return str(hub.wheel_file("smollm2-135m-instruct"))


@pytest.fixture(scope="session")
def gemma3_path() -> str:
    """Path of Gemma-3-270M as a GGUF file."""
    from jaxinfer.checkpoint import hub

    return str(hub.wheel_file("gemma-3-270m"))
