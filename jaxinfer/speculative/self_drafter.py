"""The target drafts for itself, cheaper: with fewer of its layers, or in fewer bits."""

from __future__ import annotations

from jaxinfer.speculative.drafter import Drafter, static


class SelfDrafter(Drafter, kw_only=True):
    """What `LLM.speculation` makes a ModelDrafter of that shares what it can with the model.

    "self" is `SelfDrafter()`, "self:int8" is `SelfDrafter(quantize="int8")`.
    """

    # Which to keep, ascending (arXiv 2309.08168); None: the first and last quarter, and every other
    # one between, or all of them where there is a recipe.
    layers: tuple[int, ...] | None = static(None)
    quantize: str | None = static(None)  # a recipe, see `load`; its weights lie beside the model's
