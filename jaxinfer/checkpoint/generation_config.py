"""generation_config.json: the sampling parameters that a model's authors recommend; end tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.checkpoint.fields import MAX_VOCAB
from jaxinfer.errors import CorruptFile, InvalidArgument
from jaxinfer.sampling import MAX_STOP, SamplingParams

# Their name -> ours. What is null, or absent, keeps our default.
FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}


def default_params(config: Mapping[str, Any], *, where: str) -> SamplingParams:
    """Translate the recommendation; greedy unless it says do_sample, as in transformers.

    Raises CorruptFile for a value that no `SamplingParams` takes.
    """
    sampled = config.get("do_sample") is True
    greedy_too = {"repetition_penalty"}
    given = {
        ours: config[theirs]
        for theirs, ours in FIELDS.items()
        if config.get(theirs) is not None and (sampled or theirs in greedy_too)
    }
    if sampled:
        given = {"temperature": 1.0, **given}
    try:
        return SamplingParams(**given)
    except InvalidArgument as error:
        raise CorruptFile(f"{where}: {error}") from error


def eos_ids(config: Mapping[str, Any], *, where: str) -> tuple[int, ...]:
    """The end tokens that config.json or generation_config.json names: none, one or a list."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > MAX_STOP // 2:  # the rest is for stop_token_ids
        raise CorruptFile(f"{where}: eos_token_id lists {len(ids)} tokens, above {MAX_STOP // 2}")
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < MAX_VOCAB:
            raise CorruptFile(f"{where}: eos_token_id holds {i!r:.60}; expected token ids")
    return tuple(ids)
