"""What the model thinks of given tokens: log-probabilities, logits, hidden states. Ids only."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import memory, steps
from jaxinfer.batch import Model
from jaxinfer.errors import InvalidArgument
from jaxinfer.outputs import ForwardOutput

CHUNK = steps.PREFILL_WIDTHS[-1]


def score(model: Model, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Log-probability [T-1] f32 of each token given those before it, a row of T ids each."""
    longest = max(map(len, ids))
    batch = model.rows(len(ids))
    held = model.new_cache(batch, steps.capacity_for(longest))
    lengths = np.array([len(row) - 1 for row in ids] + [0] * (batch - len(ids)), np.int32)
    parts = [np.zeros((batch, 0), np.float32)]
    for at in range(0, longest - 1, CHUNK):
        width = steps.bucket(longest - 1 - at, steps.PREFILL_WIDTHS)
        tokens = _padded([row[at : at + width + 1] for row in ids], batch, width + 1)
        logp, held = steps.score(
            model.params,
            tokens[:, :-1],
            tokens[:, 1:],
            np.clip(lengths - at, 0, width),
            held,
            config=model.config,
        )
        parts.append(np.asarray(logp))
    scores = np.concatenate(parts, axis=1)
    return [scores[b, : len(row) - 1] for b, row in enumerate(ids)]


def forward(model: Model, ids: Sequence[Sequence[int]], layers: Sequence[int]) -> ForwardOutput:
    """Logits of every position, and the residual stream behind `layers`; see `LLM.forward`."""
    count = model.config.num_layers
    if any(not -count <= i < count for i in layers):
        raise InvalidArgument(f"layers={tuple(layers)}: the model has {count} layers")
    longest, batch = max(map(len, ids)), model.rows(len(ids))
    memory.require(
        2 * 4 * batch * longest * model.config.vocab_size,  # in chunks, then in one piece
        f"float32 logits of {batch} rows x {longest} tokens",
        "fewer or shorter rows",
        model.devices,
    )
    held = model.new_cache(batch, steps.capacity_for(longest))
    lengths = np.array([len(row) for row in ids] + [0] * (batch - len(ids)), np.int32)
    wanted = tuple(sorted({i % count for i in layers}))
    parts = []
    for at in range(0, longest, CHUNK):
        width = steps.bucket(longest - at, steps.PREFILL_WIDTHS)
        logits, hidden, held = steps.logits_and_states(
            model.params,
            _padded([row[at : at + width] for row in ids], batch, width),
            np.clip(lengths - at, 0, width),
            held,
            config=model.config,
            layers=wanted,
        )
        parts.append((logits, hidden))

    def whole(*chunks: jax.Array) -> jax.Array:
        joined = jnp.concatenate(chunks, axis=1) if len(chunks) > 1 else chunks[0]
        return joined[: len(ids), :longest]  # the rest is padding to a bucket

    logits, states = jax.tree.map(whole, *parts)
    return ForwardOutput(
        logits, jnp.asarray(lengths[: len(ids)]), {i: states[i % count] for i in layers}
    )


def _padded(ids: Sequence[Sequence[int]], batch: int, width: int) -> np.ndarray:
    """Ids as an array [batch, width] i32, zeros behind each row."""
    out = np.zeros((batch, width), np.int32)
    for b, row in enumerate(ids):
        out[b, : len(row)] = row
    return out
