"""Drafters of every kind on tiny models, what they are tried on, and what is compared."""

from __future__ import annotations

import jax.numpy as jnp

from jaxinfer.sampling import SamplingParams
from jaxinfer.speculative.drafter import Draft, Drafter, static
from jaxinfer.speculative.fallback import FallbackDrafter
from jaxinfer.speculative.ngram import NGramDrafter
from jaxinfer.speculative.self_drafter import SelfDrafter
from jaxinfer.testing import tiny_llm

PROMPTS = [
    "abcabcabc",
    "hello, hello",
    "x",
    "to be or not to be, that is",
    "zz",
    "a1b2a1b2",
    "q",
    "~~~~",
]
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
WARM = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.9, top_p=0.9, seed=5)
NAMES = ["ngram", "user", "same", "other", "self", "self:int8", "fallback", "other vocabulary"]


class LastToken(Drafter, kw_only=True):
    """Offers the last token again and again."""

    num_draft: int = static(3)

    def propose(self, state, context, rows, want, keys):
        """The last token, as often as wanted."""
        last = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)
        return Draft(jnp.repeat(last, self.max_draft, axis=1), want), state


def drafter(name, llm, num_draft):
    other = tiny_llm(seed=4)
    model = llm.speculation(other).drafter
    found = {
        "ngram": NGramDrafter(min_ngram=1),
        "user": LastToken(),
        "same": llm.speculation(llm).drafter,
        "other": model,
        "self": llm.speculation(SelfDrafter(layers=(0,))).drafter,
        "self:int8": llm.speculation("self:int8").drafter,
        "other vocabulary": llm.speculation(tiny_llm(llm.config.vocab_size - 9, seed=4)).drafter,
        "fallback": FallbackDrafter(first=NGramDrafter(), second=model),
    }[name]
    return found.replace(num_draft=num_draft)


def ids(outputs):
    return [o.token_ids for o in outputs]
