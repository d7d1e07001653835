"""Draft and verify: cheap guesses, judged by the model in one forward; the text stays its own."""

from jaxinfer.speculative.drafter import Draft, Drafter, static
from jaxinfer.speculative.fallback import FallbackDrafter
from jaxinfer.speculative.model_drafter import ModelDrafter
from jaxinfer.speculative.ngram import NGramDrafter
from jaxinfer.speculative.self_drafter import SelfDrafter

__all__ = [
    "Draft",
    "Drafter",
    "FallbackDrafter",
    "ModelDrafter",
    "NGramDrafter",
    "SelfDrafter",
    "static",
]
