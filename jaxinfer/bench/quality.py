"""What quantizing or pruning costs in quality: a model against the one it was made from, on text.

Of every position of the text: KL(p||q) in nats between the next-token distributions p of the
reference and q of the other, both models' negative log-likelihood of the token that follows, and
whether they would choose the same token.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxinfer.bench.speed import run_all, system
from jaxinfer.cache import KVCache
from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM
from jaxinfer.model import Params, forward, head

WINDOW = 256  # tokens of a stretch of text; each is read from its own beginning
ROWS = 4  # stretches read at once
FEW = 64  # positions whose logits exist at once
SPEED_TOKENS = 64  # a run


class Found(NamedTuple):
    """Of each position [n]."""

    kl: np.ndarray  # f32, nats
    reference: np.ndarray  # f32, -log p of the token that follows
    other: np.ndarray  # f32, -log q of it
    same: np.ndarray  # bool, the likeliest token is the same


def stretches(llm: LLM, text: str, tokens: int) -> np.ndarray:
    """About `tokens` tokens of a text in stretches [n,WINDOW], taken evenly from all of it.

    Raises InvalidArgument where the text is too short for one.
    """
    window = min(WINDOW, llm.max_len)
    wanted = max(1, tokens // window)
    # Not all of a long text is tokenized: a token has ten bytes at most, on average.
    piece = 10 * window
    starts = np.linspace(0, max(0, len(text) - piece), wanted).astype(int)
    rows = [llm.tokenizer.encode(text[a : a + piece])[:window] for a in starts]
    whole = [row for row in rows if len(row) == window]
    if not whole:
        raise InvalidArgument(f"the text is too short: {window} tokens are the least")
    return np.array(whole, np.int32)


def compare(reference: LLM, other: LLM, rows: np.ndarray) -> Found:
    """Read the same stretches [n,W] with both models.

    Raises InvalidArgument where their vocabularies differ.
    """
    if reference.model.vocab_limit != other.model.vocab_limit:
        raise InvalidArgument("the two models have different vocabularies")
    found = []
    for first in tqdm(range(0, len(rows), ROWS), desc="reading", unit="stretch", leave=False):
        part = rows[first : first + ROWS]
        padded = np.pad(part, [(0, ROWS - len(part)), (0, 0)])
        measured = _compare(
            *(padded, reference.params, other.params),
            *(m.new_cache(ROWS, padded.shape[1]) for m in (reference.model, other.model)),
            configs=(reference.config, other.config),
            limit=reference.model.vocab_limit,
        )
        found.append([np.asarray(x)[: len(part)].reshape(-1) for x in measured])
    return Found(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


@partial(jax.jit, static_argnames=("configs", "limit"))
def _compare(
    tokens: jax.Array,  # [B,W]
    params: Params,
    other: Params,
    cache: KVCache,
    cache_of_other: KVCache,
    *,
    configs: tuple[ModelConfig, ModelConfig],
    limit: int,
) -> tuple[jax.Array, ...]:
    size = tokens.shape[1] - 1
    width = -(-size // FEW) * FEW
    num_new = jnp.full((len(tokens),), size)
    fed = jnp.pad(tokens[:, :-1], [(0, 0), (0, width - size)])
    after = jnp.pad(tokens[:, 1:], [(0, 0), (0, width - size)])
    a, _ = forward(params, fed, num_new, cache, config=configs[0])
    b, _ = forward(other, fed, num_new, cache_of_other, config=configs[1])

    def few(parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:  # [B,FEW,...]
        a, b, after = parts
        p, q = (
            jax.nn.log_softmax(head(w, x, config=c)[..., :limit], axis=-1)
            for w, x, c in zip((params, other), (a, b), configs, strict=True)
        )
        chosen = [-jnp.take_along_axis(x, after[..., None], axis=-1)[..., 0] for x in (p, q)]
        same = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1), *chosen, same

    def split(x: jax.Array) -> jax.Array:  # [B,W,...] -> [W/FEW,B,FEW,...]
        return jnp.moveaxis(x.reshape(len(x), -1, FEW, *x.shape[2:]), 1, 0)

    measured = jax.lax.map(few, tuple(map(split, (a, b, after))))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(len(tokens), -1)[:, :size] for x in measured)


def summary(found: Found) -> dict[str, float]:
    """The figures of a row: perplexities, KL in nats, share of positions that agree."""
    return {
        "perplexity": float(np.exp(found.other.mean(dtype=np.float64))),
        "reference_perplexity": float(np.exp(found.reference.mean(dtype=np.float64))),
        "mean_kl": float(found.kl.mean(dtype=np.float64)),
        "max_kl": float(found.kl.max()),
        "agreement": float(found.same.mean()),
        "positions": int(found.kl.size),
    }


def speed(reference: LLM, other: LLM, prompt: Sequence[int], runs: int) -> dict[str, float]:
    """Tokens per second of plain decoding, and their ratio to the reference's, runs alternating."""
    both = {"a": reference, "b": other}
    systems = {name: system(llm, None, SPEED_TOKENS) for name, llm in both.items()}
    answers: Any = run_all(systems, {"text": [list(prompt)]}, runs)
    rates = [
        [run[0].tokens / run[0].seconds for run in answers[name]["text"]] for name in ("a", "b")
    ]
    ratio = statistics.median(b / a for a, b in zip(*rates, strict=True))
    return {"tokens_per_second": statistics.median(rates[1]), "speedup": ratio}
