"""Tokens per second of greedy decoding: plain, with each drafter, and of other systems.

The runs of all systems alternate, prompt by prompt: a machine that is slow for a while is so for
all of them. Time is that of generating; reading the prompt is left out everywhere.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxinfer import steps
from jaxinfer.batch import Model, capacity_of
from jaxinfer.cache import KVCache, cache_bytes
from jaxinfer.calibrate import measure
from jaxinfer.config import ModelConfig
from jaxinfer.generate import LLM
from jaxinfer.model import Params, forward, head, project
from jaxinfer.sampling import SamplingParams
from jaxinfer.speculative.drafter import Drafter, NoDrafter
from jaxinfer.speculative.ngram import NGramDrafter
from jaxinfer.speculative.speculation import CANONICAL, Speculation, Verifier

VERIFIED = (1, 2, 4, 8, 16)  # tokens a forward whose cost the table shows


class Answer(NamedTuple):
    """One answer of one system."""

    tokens: int
    seconds: float  # of generating them
    rounds: int = 0  # of speculation
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0  # of those seconds, on drafting


Kinds = Mapping[str, Sequence[list[int]]]  # token ids of prompts, by kind
System = Callable[[list[int]], Answer]  # answers a prompt


def system(llm: LLM, drafter: Drafter | str | None, max_tokens: int, **options: Any) -> System:
    """Ours, with a drafter; `options` as `LLM.generate` takes them."""
    params = SamplingParams(max_tokens=max_tokens)

    def run(ids: list[int]) -> Answer:
        s = llm.generate(ids, params, drafter=drafter, **options).stats
        return Answer(
            s.new_tokens, s.decode_seconds, s.rounds, s.drafted, s.accepted, s.draft_seconds
        )

    return run


def compare(
    llm: LLM,
    drafters: Mapping[str, Drafter | str],
    prompts: Kinds,
    *,
    max_tokens: int = 128,
    runs: int = 5,
    exact: bool = False,
    verifier: Verifier = "auto",
    peers: Mapping[str, System] | None = None,
    costs: bool = True,
) -> dict[str, Any]:
    """Measure plain decoding, each drafter and each peer on the same prompts.

    Returns:
      What `jaxinfer bench --json` writes, but for how the model was loaded: rates in tokens/s
      and bytes/s, times in seconds, and ratios to plain decoding. `bench.plot` draws it.
      "outside_model" is the share of a plain round that is no step of the model, "drafting" that of
      a system's time in which it drafts.
    """
    systems = {
        "memory": bandwidth(llm.model),
        "model": alone(llm, max_tokens, exact),
        "plain": system(llm, None, max_tokens, exact=exact),
        **{
            name: system(llm, drafter, max_tokens, exact=exact, verifier=verifier)
            for name, drafter in drafters.items()
        },
        **(peers or {}),
    }
    found = summarise(run_all(systems, prompts, runs))
    memory = found.pop("memory")["tokens_per_second"]["all"]
    model = found.pop("model")
    limit = memory["median"] / llm.nbytes
    longest = max(len(ids) for each in prompts.values() for ids in each)
    capacity = min(longest + max_tokens, llm.max_len)
    return {
        "dtype": llm.model.dtype.name,
        "device": llm.model.devices[0].device_kind,
        "exact": exact,
        "runs": runs,
        "max_tokens": max_tokens,
        "weight_bytes": llm.nbytes,
        "cache_bytes": {kind: _held(llm, each) for kind, each in prompts.items()},
        "bytes_per_second": memory,
        "limit_tokens_per_second": limit,
        "fraction_of_limit": found["plain"]["tokens_per_second"]["all"]["median"] / limit,
        "model_tokens_per_second": model["tokens_per_second"]["all"],
        "outside_model": 1 - 1 / model["speedup"]["all"],
        "systems": found,
        "verifier": verifier,
        "verify_seconds": verify_costs(llm, capacity, exact) if costs else {},
    }


def _held(llm: LLM, prompts: Sequence[list[int]]) -> int:
    """Bytes of cache of the longest of these prompts."""
    longest = max(map(len, prompts))
    return cache_bytes(llm.config, 1, longest, llm.model.dtype, llm.model.store)


def run_all(
    systems: Mapping[str, System], prompts: Kinds, runs: int
) -> dict[str, dict[str, list[list[Answer]]]]:
    """Answers[system][kind][run][prompt], after a warm-up that is thrown away."""
    answers: dict[str, dict[str, list[list[Answer]]]] = {
        name: {kind: [[] for _ in range(runs)] for kind in prompts} for name in systems
    }
    work = [(kind, ids) for kind, each in prompts.items() for ids in each]
    with tqdm(total=(runs + 1) * len(work) * len(systems), unit="answer", leave=False) as bar:
        for number in range(-1, runs):
            for kind, ids in work:
                for name, answer in systems.items():
                    bar.set_postfix_str(name, refresh=False)
                    got = answer(ids)
                    bar.update()
                    if number >= 0:
                        answers[name][kind][number].append(got)
    return answers


def summarise(answers: Mapping[str, Mapping[str, list[list[Answer]]]]) -> dict[str, Any]:
    """Of each system: tokens per second and its ratio to "plain", by kind and over all.

    A ratio is taken run by run, and the median of them is told: both runs saw the same machine.
    """
    whole = {name: {**kinds, "all": _joined(kinds)} for name, kinds in answers.items()}
    rates = {
        name: {kind: [_rate(run) for run in runs] for kind, runs in kinds.items()}
        for name, kinds in whole.items()
    }
    found = {}
    for name, kinds in rates.items():
        every = [a for run in whole[name]["all"] for a in run]
        rounds, drafted = sum(a.rounds for a in every), sum(a.drafted for a in every)
        found[name] = {
            "tokens_per_second": {kind: spread(rate) for kind, rate in kinds.items()},
            "speedup": {
                kind: statistics.median(
                    a / b for a, b in zip(rate, rates["plain"][kind], strict=True)
                )
                for kind, rate in kinds.items()
            },
            "tokens_per_round": {
                kind: _ratio(runs, lambda a: a.tokens, lambda a: a.rounds)
                for kind, runs in whole[name].items()
            }
            if rounds
            else None,
            "drafting": sum(a.draft_seconds for a in every)
            / max(sum(a.seconds for a in every), 1e-9),
            "acceptance": sum(a.accepted for a in every) / drafted if drafted else None,
        }
    return found


def _joined(kinds: Mapping[str, list[list[Answer]]]) -> list[list[Answer]]:
    """The answers to all kinds, run by run."""
    return [[a for part in parts for a in part] for parts in zip(*kinds.values(), strict=True)]


def _rate(run: Sequence[Answer]) -> float:
    return sum(a.tokens for a in run) / max(sum(a.seconds for a in run), 1e-9)


def _ratio(
    runs: Sequence[Sequence[Answer]],
    upper: Callable[[Answer], int],
    lower: Callable[[Answer], int],
) -> float:
    every = [a for run in runs for a in run]
    return sum(map(upper, every)) / max(1, sum(map(lower, every)))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def verify_costs(llm: LLM, capacity: int, exact: bool = False) -> dict[int, float]:
    """Seconds of a round of one row (a device) that verifies m tokens, by m."""
    found, rows = {}, llm.model.rows(1)
    for m in tqdm(VERIFIED, desc="cost of verifying", leave=False):
        drafter = NoDrafter() if m == 1 else NGramDrafter(num_draft=m - 1)
        speculation = Speculation(drafter, exact=exact)
        costs = measure(llm.model, speculation, rows, steps.capacity_for(capacity))
        found[m] = costs.verify_seconds[-1]
    return found


def alone(llm: LLM, max_tokens: int, exact: bool) -> System:
    """The model without the library: a forward, its logits and the likeliest token, again and again
    in one program, as many tokens as the plain answer has, on caches and of a width as it had."""
    model, params = llm.model, SamplingParams(max_tokens=max_tokens)
    rows, plain = model.rows(1), llm.speculation(None, exact=exact)
    lengths = dict[tuple[int, ...], int]()  # of the answers, by prompt

    def run(ids: list[int]) -> Answer:
        if tuple(ids) not in lengths:
            out = llm.generate(ids, params, drafter=None, exact=exact)
            lengths[tuple(ids)] = len(out.token_ids)
        at, end = len(ids), len(ids) + lengths[tuple(ids)]
        capacity, seconds = capacity_of(llm._requests([ids], params, {}), plain), 0.0
        while at < end:
            count = min(end, capacity) - at
            cache = model.new_cache(rows, capacity, exact=exact)
            start = dataclasses.replace(cache, lengths=cache.lengths + at - 1)
            token, start = model.place((jnp.zeros((rows,), jnp.int32), start))
            jax.block_until_ready(start)
            begin = time.perf_counter()
            jax.block_until_ready(
                _likeliest(
                    model.params,
                    token,
                    start,
                    np.int32(count),
                    config=model.config,
                    width=CANONICAL if exact else model.narrow(rows),
                )
            )
            seconds += time.perf_counter() - begin
            at, capacity = at + count, steps.capacity_for(capacity + 1)
        return Answer(end - len(ids), seconds)

    return run


@partial(jax.jit, static_argnames=("config", "width"), donate_argnames=("cache",))
def _likeliest(
    params: Params,
    token: jax.Array,  # [B] i32
    cache: KVCache,
    count: jax.Array,  # [] i32
    *,
    config: ModelConfig,
    width: int,
) -> tuple[jax.Array, KVCache]:
    def step(_: int, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        token, cache = carry
        fed = jnp.broadcast_to(token[:, None], (token.shape[0], width))
        hidden, cache = forward(params, fed, jnp.ones_like(token), cache, config=config)
        logits = head(params, hidden, config=config)
        return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, count, step, (token, cache))


def bandwidth(model: Model) -> System:
    """Reads a matrix much larger than any cache, as the model's own product does.

    A token stands for a byte here; the prompt does not matter.
    """
    matrix = jax.device_put(jnp.ones((4096, 32768), model.dtype), model.own_device)
    rows = jax.device_put(jnp.ones((1, model.narrow(1), 4096), model.dtype), model.own_device)
    product = jax.jit(project)

    def run(ids: list[int]) -> Answer:
        begin = time.perf_counter()
        product(rows, matrix).block_until_ready()
        return Answer(matrix.nbytes, time.perf_counter() - begin)

    return run
