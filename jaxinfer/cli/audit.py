"""jaxinfer audit: does this drafter change what this model says? Exit code 1 if it does.

Greedy answers in exact mode must be the same bits with and without the drafter; in the default mode
they may part only where rounding decides. Sampled tokens must come as often as without it.

  jaxinfer audit --drafter=ngram
  jaxinfer audit --model=gemma-3-270m --drafter=smollm2-135m-instruct --draws=10000
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from absl import flags

from jaxinfer.cli.model_flags import (
    define_mesh_flags,
    define_model_flags,
    define_speculation_flags,
    load_model,
    speculation_options,
)
from jaxinfer.errors import InvalidArgument
from jaxinfer.sampling import SamplingParams

# Text that repeats, so that n-gram lookup has something to offer, yet leaves a choice.
SAMPLED = ("The cat sat on the mat. The dog sat on the", "red, blue, green, red, blue, red,")
SAMPLED_BATCH = 32  # of them run at once


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags on `values`."""
    to: dict[str, Any] = {"flag_values": values}
    define_model_flags(values)
    define_mesh_flags(values)
    define_speculation_flags(values)
    values["drafter"].default = values["drafter"].value = "ngram"
    flags.DEFINE_string("prompts", None, "A file: a prompt a line, or .jsonl with kinds.", **to)
    flags.DEFINE_integer("max_tokens", 64, "Longest greedy answer.", **to)
    flags.DEFINE_integer("batch", 8, "Prompts that run at once.", **to)
    flags.DEFINE_integer("draws", 1000, "Sampled answers to each of two prompts; 0: none.", **to)
    flags.DEFINE_integer("sampled_tokens", 6, "Tokens of a sampled answer.", **to)
    flags.DEFINE_float("temperature", 1.0, "Of the sampled answers.", **to)
    flags.DEFINE_float("top_p", 1.0, "Of the sampled answers.", **to)
    flags.DEFINE_integer("seed", 0, "Of the sampled answers.", **to)
    flags.DEFINE_boolean("json", False, "Write one JSON object.", **to)


def run(values: flags.FlagValues) -> int:
    """Audit and print the verdict; the exit code is 1 where it is bad."""
    for name, least in (("max_tokens", 1), ("batch", 1), ("draws", 0), ("sampled_tokens", 1)):
        count: Any = values[name].value
        if count < least:
            raise InvalidArgument(f"--{name}={count}: must be {least} or more")
    if values.drafter == "none":
        raise InvalidArgument("--drafter=none: name the drafter to audit")
    if not values.temperature > 0:
        raise InvalidArgument(f"--temperature={values.temperature}: must be above 0 to sample")
    params = SamplingParams(
        max_tokens=values.sampled_tokens,
        temperature=values.temperature,
        top_p=values.top_p,
        seed=values.seed,
    )
    from jaxinfer.bench import audit
    from jaxinfer.bench.prompts import PROMPTS, chat_or_plain, read_prompts

    texts = read_prompts(values.prompts) if values.prompts else PROMPTS
    options = speculation_options(values)
    llm = load_model(values, max_batch=max(values.batch, SAMPLED_BATCH), **options)
    drafter = llm.default_speculation.drafter
    prompts = [chat_or_plain(llm, text) for each in texts.values() for text in each]
    found = {}
    for mode in ("exact",) if values.exact else ("exact", "default"):
        found[f"greedy, {mode} mode"] = audit.greedy(
            llm,
            drafter,
            prompts,
            batch=values.batch,
            max_tokens=values.max_tokens,
            exact=mode == "exact",
            verifier=values.verifier if mode == "default" else "exact",
        )
    drawn = audit.sampled(
        llm,
        drafter,
        [llm.tokenizer.encode(text) for text in SAMPLED if values.draws],
        params=params,
        draws=values.draws,
        batch=SAMPLED_BATCH,
        verifier=values.verifier,
    )
    faults = []
    exact_mode = found["greedy, exact mode"]
    if exact_mode.divergences:
        faults.append("greedy answers differ in exact mode")
    if any(not one.holds for one in found.values() if one is not exact_mode):
        faults.append("a greedy answer differs by more than rounding")
    if drawn.refused:
        faults.append("sampled tokens come with other frequencies")
    idle = not exact_mode.drafted or (values.draws and not drawn.drafted)
    verdict = "lossless"
    if faults:
        verdict = "NOT lossless: " + "; ".join(faults)
    elif idle:
        verdict = "nothing is proved, as nothing was drafted: try --num_draft=3 or other --prompts"
    if values.json:
        record = {name: dataclasses.asdict(one) for name, one in found.items()}
        record["sampled"] = dataclasses.asdict(drawn)
        print(json.dumps({"lossless": verdict == "lossless", "verdict": verdict, **record}))
    else:
        print(_report(found, drawn, verdict))
    return 0 if verdict == "lossless" else 1


def _report(found: dict[str, Any], drawn: Any, verdict: str) -> str:
    lines = []
    for name, one in found.items():
        lines.append(
            f"{name}: {one.identical} of {one.prompts} answers identical"
            f" ({one.tokens:,} tokens, {one.drafted:,} drafted, {one.accepted:,} kept)"
        )
        lines += [
            f"  prompt {d.prompt} differs from token {d.position} on, where the two likeliest are"
            f" {d.margin:.2g} apart; rounding moves a logit by up to {one.noise:.2g}"
            for d in one.divergences
        ]
    if drawn.draws:
        lines.append(
            f"sampled: {drawn.draws:,} answers to each prompt with and without a draft"
            f" ({drawn.drafted:,} tokens drafted, {drawn.accepted:,} kept)"
        )
    lines += [
        f"  prompt {p.prompt}, token {p.position}: chi-square {p.statistic:.1f} with {p.freedom}"
        f" degrees of freedom, p = {p.pvalue:.3g}{' REFUSED' if p in drawn.refused else ''}"
        for p in drawn.positions
    ]
    return "\n".join([*lines, f"verdict: {verdict}"])
