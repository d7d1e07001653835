"""jaxinfer: run a language model fast in JAX, without changing what it would have said.

>>> import jaxinfer
>>> llm = jaxinfer.load("smollm2-135m-instruct")
>>> llm.generate("The capital of France is", max_tokens=8).text
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.config import ModelConfig as ModelConfig
    from jaxinfer.errors import JaxinferError as JaxinferError
    from jaxinfer.generate import LLM as LLM
    from jaxinfer.loading import load as load
    from jaxinfer.outputs import GenerationOutput as GenerationOutput
    from jaxinfer.planner.plan import plan as plan
    from jaxinfer.sampling import SamplingParams as SamplingParams
    from jaxinfer.sharding import make_mesh as make_mesh

__version__ = "0.1.0"

# Where each public name lives. Loaded on first use: `import jaxinfer` alone costs next to nothing.
_HOMES = {
    "LLM": "generate",
    "load": "loading",
    "GenerationOutput": "outputs",
    "JaxinferError": "errors",
    "ModelConfig": "config",
    "SamplingParams": "sampling",
    "make_mesh": "sharding",
    "plan": "planner.plan",
}
_ROOMS = ("distributed", "sharding", "speculative", "testing")  # modules to use as they are

__all__ = [  # noqa: RUF022 - in the order a reader meets them
    "load",
    "LLM",
    "SamplingParams",
    "GenerationOutput",
    "ModelConfig",
    "make_mesh",
    "plan",
    "JaxinferError",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxinfer.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"jaxinfer.{name}")
    raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_ROOMS])
