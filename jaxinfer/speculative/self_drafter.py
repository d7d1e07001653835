"""The target drafts for itself, cheaper: with fewer of its layers, or in fewer bits."""

from __future__ import annotations

from typing import Any

from jaxinfer.errors import InvalidArgument
from jaxinfer.speculative.drafter import Drafter, static


class SelfDrafter(Drafter, kw_only=True):
    """What `LLM.speculation` makes a ModelDrafter of, with the model's own weights or fewer bits.

    "self" is `SelfDrafter()`, "self:int8" is `SelfDrafter(quantize="int8")`.
    """

    # Which to keep, ascending (arXiv 2309.08168); None: the first and last quarter, and every other
    # one between, or all of them where there is a recipe.
    layers: tuple[int, ...] | None = static(None)
    quantize: str | None = static(None)  # a recipe, see `load`; its weights lie beside the model's

    def __post_init__(self) -> None:
        layers: Any = self.layers
        whole = layers is None or (
            isinstance(layers, tuple) and layers and all(type(i) is int for i in layers)
        )
        if not whole or not isinstance(self.quantize, str | None):
            raise InvalidArgument(
                f"SelfDrafter(layers={layers!r:.40}, quantize={self.quantize!r:.40}): a tuple of"
                " layer numbers, and the name of a recipe"
            )
