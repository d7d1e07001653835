"""jaxinfer generate: continue prompts, or answer them where the model chats.

Text goes to stdout, everything else to stderr.

  jaxinfer generate --prompt="What is the capital of France?"
  jaxinfer generate --model=gemma-3-270m --prompt="Once upon a time" --temperature=0.8 --seed=1
  jaxinfer generate --prompt_file=questions.txt --json > answers.jsonl
  jaxinfer generate --prompt="Repeat: one two three four" --drafter=ngram --stats
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
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

SAMPLING = (  # flags that are fields of SamplingParams, absent unless given
    (flags.DEFINE_integer, "max_tokens", "At most this many new tokens."),
    (flags.DEFINE_integer, "min_tokens", "No end of sequence before this many new tokens."),
    (flags.DEFINE_float, "temperature", "0 is greedy."),
    (flags.DEFINE_integer, "top_k", "Keep the k likeliest tokens; 0 keeps all."),
    (flags.DEFINE_float, "top_p", "Keep the smallest set of tokens with this mass."),
    (flags.DEFINE_float, "min_p", "Keep tokens this many times as likely as the likeliest."),
    (flags.DEFINE_float, "repetition_penalty", "Above 1: seen tokens become less likely."),
    (flags.DEFINE_float, "presence_penalty", "Subtracted once from a generated token's logit."),
    (flags.DEFINE_float, "frequency_penalty", "Subtracted each time a token was generated."),
    (flags.DEFINE_multi_string, "stop", "The text ends before this; repeatable."),
    (flags.DEFINE_multi_integer, "stop_token_ids", "Token ids that end the text; repeatable."),
    (flags.DEFINE_boolean, "ignore_eos", "Go on past the model's own end tokens."),
    (flags.DEFINE_integer, "seed", "Same seed, same text."),
    (flags.DEFINE_integer, "n", "Samples of each prompt."),
    (flags.DEFINE_integer, "logprobs", "With --json: this many alternatives a token."),
)


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags on `values`."""
    to: dict[str, Any] = {"flag_values": values}
    define_model_flags(values)
    define_mesh_flags(values)
    define_speculation_flags(values)
    flags.DEFINE_multi_string("prompt", [], "Text to continue or answer; repeatable.", **to)
    flags.DEFINE_string("prompt_file", None, "A file with a prompt a line; - is stdin.", **to)
    flags.DEFINE_boolean("chat", None, "Use the chat template; default: if there is one.", **to)
    flags.DEFINE_boolean("stream", False, "Write text as it comes; one prompt only.", **to)
    flags.DEFINE_boolean("json", False, "Write one JSON object a prompt.", **to)
    flags.DEFINE_boolean("stats", False, "Write counts and times to stderr.", **to)
    for define, name, text in SAMPLING:
        define(name, None, text, **to)


def run(values: flags.FlagValues) -> None:
    """Generate as the flags say."""
    prompts = list(values.prompt) + _read_prompts(values.prompt_file)
    if not prompts:
        raise InvalidArgument("no prompt: give --prompt='...' or --prompt_file=FILE")
    if any(not p.strip() for p in prompts):
        raise InvalidArgument("a prompt is empty: give it some text")
    if values.stream and (len(prompts) > 1 or (values.n or 1) > 1 or values.json):
        raise InvalidArgument("--stream writes one text: give one prompt, no --n, no --json")
    if values.stream and values.stats:
        raise InvalidArgument("--stream writes text alone: leave out --stats, or --stream")
    if values.logprobs is not None and not values.json:
        raise InvalidArgument("--logprobs has no place in plain text: add --json")
    given: Any = {
        name: values[name].value for _, name, _ in SAMPLING if values[name].value is not None
    }
    SamplingParams(**given)  # complains of bad values before anything is loaded

    llm = load_model(values, **speculation_options(values))
    params = dataclasses.replace(llm.default_params, **given)
    chat = llm.chats if values.chat is None else values.chat
    inputs = [llm.chat_ids([{"role": "user", "content": p}]) for p in prompts] if chat else prompts
    if values.stream:
        for piece in llm.stream(inputs[0], params):
            print(piece, end="", flush=True)
        print()
        return
    outputs = llm.generate(inputs, params)
    for group in outputs:
        for output in group if isinstance(group, list) else [group]:
            _write(output, values)


def _read_prompts(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"--prompt_file={file}: {error}") from error
    return [line for line in text.splitlines() if line.strip()]


def _write(output: Any, values: flags.FlagValues) -> None:
    if values.json:
        record = {
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "stats": dataclasses.asdict(output.stats),
        }
        if output.logprobs is not None:
            record["logprobs"] = [t._asdict() for t in output.logprobs]
        print(json.dumps(record, ensure_ascii=False))
    else:
        print(output.text)
    if values.stats:
        for name, value in dataclasses.asdict(output.stats).items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{name:>20} {shown}", file=sys.stderr)
