"""Is speculation lossless here? Greedy answers with and without it, and a test of sampled tokens.

Two questions, put to the pair of model and drafter that will be used:

- greedy: are the answers the same, bit for bit in exact mode? In the default mode, does an answer
  part from the plain one only where the two likeliest tokens are closer than the logits' rounding?
- sampled: do tokens come as often as without a drafter? A chi-square test of homogeneity at each
  position, on independent draws, corrected for their number (Holm, 1979).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxinfer import steps
from jaxinfer.generate import LLM
from jaxinfer.outputs import GenerationOutput
from jaxinfer.sampling import SamplingParams
from jaxinfer.sharding import fetch
from jaxinfer.speculative.drafter import Drafter

LEVEL = 0.01  # a true null hypothesis is refused this often
MIN_COUNT = 10  # draws of a token in both arms together, below which tokens are lumped


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where a speculative answer parts from the plain one."""

    prompt: int
    position: int  # of the answer's tokens
    margin: float  # plain logit of the likeliest token less that of the second


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Greedy answers compared."""

    prompts: int
    identical: int
    tokens: int
    drafted: int
    accepted: int
    divergences: list[Divergence]
    noise: float | None  # largest difference of a logit between widths; None: nothing to explain

    @property
    def holds(self) -> bool:
        """Whether each divergence is one of rounding."""
        return all(self.noise is not None and d.margin <= self.noise for d in self.divergences)


@dataclasses.dataclass(frozen=True)
class Position:
    """The test of one position of the sampled answers."""

    prompt: int
    position: int
    statistic: float
    freedom: int  # degrees of freedom; 0: one token has all the draws, nothing to test
    pvalue: float


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Sampled answers compared."""

    draws: int  # of each prompt in each arm
    drafted: int
    accepted: int
    positions: list[Position]

    @property
    def refused(self) -> list[Position]:
        """Positions whose tokens come with other frequencies, by Holm's procedure."""
        tested = sorted((p for p in self.positions if p.freedom), key=lambda p: p.pvalue)
        for i, p in enumerate(tested):
            if p.pvalue > LEVEL / (len(tested) - i):
                return tested[:i]
        return tested


def greedy(
    llm: LLM,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    batch: int,
    max_tokens: int,
    exact: bool,
    verifier: Any = "auto",
) -> Greedy:
    """Compare greedy answers to prompts (token ids) with and without the drafter."""
    params = SamplingParams(max_tokens=max_tokens)
    how = {"verifier": verifier, "exact": exact}
    plain = _answers(llm, prompts, params, batch, "plain", drafter=None, **how)
    fast = _answers(llm, prompts, params, batch, "drafted", drafter=drafter, **how)
    speculation = llm.speculation(drafter, **how)
    divergences, noise = [], None
    for number, (prompt, a, b) in enumerate(zip(prompts, plain, fast, strict=True)):
        if a.token_ids == b.token_ids:
            continue
        # Neither is a beginning of the other: both end with an end token, or at the same limit.
        pairs = zip(a.token_ids, b.token_ids, strict=False)
        at = next(i for i, (x, y) in enumerate(pairs) if x != y)
        text = [*prompt, *a.token_ids[: at + 1]]
        rows = llm.model.rows(min(batch, len(prompts) - number // batch * batch))
        widths = speculation.plan(llm.model.narrow(rows)).widths
        margin, moved = _margin_and_noise(llm, text, len(prompt), widths, rows)
        divergences.append(Divergence(number, at, margin))
        noise = max(noise or 0.0, moved)
    return Greedy(
        prompts=len(prompts),
        identical=len(prompts) - len(divergences),
        tokens=sum(len(o.token_ids) for o in plain),
        drafted=sum(o.stats.drafted for o in fast),
        accepted=sum(o.stats.accepted for o in fast),
        divergences=divergences,
        noise=noise,
    )


def _answers(
    llm: LLM, prompts: Sequence[Any], params: SamplingParams, batch: int, name: str, **options: Any
) -> list[GenerationOutput]:
    """`LLM.generate` of `batch` prompts at a time, with a progress bar."""
    outputs: list[GenerationOutput] = []
    with tqdm(total=len(prompts), desc=name, unit="answer", leave=False) as bar:
        for first in range(0, len(prompts), batch):
            own = dataclasses.replace(params, seed=(params.seed or 0) + first)
            outputs += llm.generate(prompts[first : first + batch], own, **options)
            bar.update(len(outputs) - bar.n)
    return outputs


def _margin_and_noise(
    llm: LLM, text: Sequence[int], prompt: int, widths: Sequence[int], rows: int
) -> tuple[float, float]:
    """Top-2 margin of the plain logits that chose the last token of `text`, and the largest
    difference of any logit of its answer between forwards as plain ones and of `widths`, in batches
    of `rows`: those that the answers were made with."""
    plain, *others = (
        _logits(llm, text[:-1], prompt - 1, w, rows) for w in (llm.model.narrow(rows), *widths)
    )
    second, first = np.sort(plain[-1])[-2:]
    return float(first - second), float(max(np.abs(plain - x).max() for x in others))


def _logits(llm: LLM, text: Sequence[int], start: int, width: int, rows: int) -> np.ndarray:
    """Logits [N,V] behind each token of `text` from `start` on, fed `width` at a time, `rows` times
    over."""
    model = llm.model
    cache = model.new_cache(rows, steps.capacity_for(len(text) + width))
    found = []
    blocks = [(0, start, steps.bucket(start, steps.PREFILL_WIDTHS))] if start else []
    blocks += [(i, min(width, len(text) - i), width) for i in range(start, len(text), width)]
    for first, count, size in blocks:
        for at in range(first, first + count, size):
            some = list(text[at : min(at + size, first + count)])
            tokens = np.array([some + [0] * (size - len(some))] * rows, np.int32)
            logits, _, cache = steps.logits_and_states(
                model.params,
                tokens,
                np.array([len(some)] * rows, np.int32),
                cache,
                config=model.config,
                layers=(),
            )
            if at >= start:
                found.append(fetch(logits)[0, : len(some)])
    return np.concatenate(found)


def sampled(
    llm: LLM,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    params: SamplingParams,
    draws: int,
    batch: int,
    verifier: Any = "auto",
) -> Sampled:
    """Compare the tokens of `draws` sampled answers to each prompt with as many plain ones."""
    seed = params.seed or 0
    drafted = accepted = 0
    positions = []
    for number, prompt in enumerate(prompts):
        arms = []
        for arm, (name, own) in enumerate((("plain", None), ("drafted", drafter))):
            drawn = dataclasses.replace(params, seed=seed + arm * draws, ignore_eos=True)
            same = [list(prompt)] * draws
            out = _answers(llm, same, drawn, batch, name, drafter=own, verifier=verifier)
            arms.append(np.array([o.token_ids for o in out]))
        drafted += sum(o.stats.drafted for o in out)
        accepted += sum(o.stats.accepted for o in out)
        for i in range(params.max_tokens):
            statistic, freedom, pvalue = homogeneity(arms[0][:, i], arms[1][:, i])
            positions.append(Position(number, i, statistic, freedom, pvalue))
    return Sampled(draws, drafted, accepted, positions)


def homogeneity(a: np.ndarray, b: np.ndarray) -> tuple[float, int, float]:
    """Chi-square of two samples of token ids: statistic, degrees of freedom, p-value.

    Tokens with few draws are lumped together, as the approximation needs.
    """
    size = int(max(a.max(), b.max())) + 1
    counts = np.stack([np.bincount(x, minlength=size) for x in (a, b)]).astype(np.float64)
    often = counts.sum(0) >= MIN_COUNT
    table = np.concatenate([counts[:, often], counts[:, ~often].sum(1, keepdims=True)], axis=1)
    table = table[:, table.sum(0) > 0]
    freedom = table.shape[1] - 1
    if not freedom:
        return 0.0, 0, 1.0
    expected = table.sum(0) * table.sum(1, keepdims=True) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    return statistic, freedom, float(jax.scipy.stats.chi2.sf(statistic, freedom))
