"""jaxinfer bench: tokens per second of greedy decoding, beside the memory's limit and a peer.

jaxinfer bench
jaxinfer bench --model=gemma-3-270m --compare=transformers --json
"""

from __future__ import annotations

import json
import time

from absl import flags

from jaxinfer.cli.model_flags import define_model_flags, load_model
from jaxinfer.errors import InvalidArgument

PROMPT = "Once upon a time, in a village at the foot of the mountains, there lived"


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags on `values`."""
    define_model_flags(values)
    flags.DEFINE_string("prompt", PROMPT, "Text to continue.", flag_values=values)
    flags.DEFINE_integer("max_tokens", 128, "New tokens a run.", flag_values=values)
    flags.DEFINE_integer("runs", 5, "Runs after one warm-up.", flag_values=values)
    flags.DEFINE_list("compare", [], "Peers on the same weights: transformers.", flag_values=values)
    flags.DEFINE_boolean("json", False, "Write one JSON object.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Measure and print as the flags say."""
    if unknown := set(values.compare) - {"transformers"}:
        raise InvalidArgument(f"--compare={unknown.pop()}: there is transformers")
    if values.runs < 1:
        raise InvalidArgument(f"--runs={values.runs}: must be 1 or more")
    from jaxinfer.bench import decode
    from jaxinfer.checkpoint import hub

    begin = time.perf_counter()
    llm = load_model(values)
    load_seconds = time.perf_counter() - begin
    ids = llm.tokenizer.encode(values.prompt)
    runners = {
        "memory": decode.bandwidth_runner(llm.model.dtype, llm.model.devices[0]),
        "jaxinfer": decode.jaxinfer_runner(llm, ids, values.max_tokens),
    }
    if "transformers" in values.compare:
        path = hub.resolve(values.model)
        runners["transformers"] = decode.transformers_runner(path, ids, values.max_tokens)
    rates = {
        name: decode.summary(rate)
        for name, rate in decode.measure(runners, runs=values.runs).items()
    }
    memory = rates.pop("memory")
    limit = memory["median"] / llm.nbytes
    ours = rates["jaxinfer"]["median"]
    result = {
        "model": values.model,
        "dtype": llm.model.dtype.name,
        "device": llm.model.devices[0].device_kind,
        "prompt_tokens": len(ids),
        "new_tokens": values.max_tokens,
        "load_seconds": load_seconds,
        "weight_bytes": llm.nbytes,
        "bytes_per_second": memory,
        "limit_tokens_per_second": limit,
        "tokens_per_second": rates,
        "fraction_of_limit": ours / limit,
        "speedup": {
            name: ours / rate["median"] for name, rate in rates.items() if name != "jaxinfer"
        },
    }
    print(json.dumps(result) if values.json else _table(result))


def _table(result: dict) -> str:
    lines = [
        f"{result['model']}, {result['dtype']}, on {result['device']}:"
        f" {result['new_tokens']} tokens behind {result['prompt_tokens']},"
        f" loaded in {result['load_seconds']:.1f} s",
        f"{'':>14} {'tokens/s':>9} {'least':>8} {'most':>8} {'of the limit':>13}",
    ]
    limit = result["limit_tokens_per_second"]
    for name, rate in result["tokens_per_second"].items():
        share = rate["median"] / limit
        cells = f"{rate['median']:>9.1f} {rate['least']:>8.1f} {rate['most']:>8.1f} {share:>12.0%}"
        lines.append(f"{name:>14} {cells}")
    speed = result["bytes_per_second"]["median"] / 1e9
    size = f"{result['weight_bytes']:,} bytes"
    lines.append(f"{'memory limit':>14} {limit:>9.1f}   ({speed:.1f} GB/s over {size})")
    return "\n".join(lines)
