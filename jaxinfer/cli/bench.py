"""jaxinfer bench: tokens per second, plain and with drafters, by kind of prompt.

Greedy answers to short prompts of four kinds, to a file of yours or behind contexts of given
lengths, one at a time. The runs of all systems alternate; a figure is the median of the runs.

  jaxinfer bench
  jaxinfer bench --drafters=ngram,self --plot=speed.png --json > speed.json
  jaxinfer bench --model=gemma-3-270m --compare=transformers,llama.cpp --prompts=mine.txt
  jaxinfer bench --contexts=128,1024,4096 --drafters=none --plot=context.png
  jaxinfer bench --quantize=int8 --compare=transformers:bfloat16,llama.cpp:model-Q8_0.gguf
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from absl import flags

from jaxinfer.cli.model_flags import (
    define_mesh_flags,
    define_model_flags,
    draft_length,
    load_drafter,
    load_model,
)
from jaxinfer.config import DTYPES
from jaxinfer.errors import InvalidArgument

PEERS = ("transformers", "llama.cpp")


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags on `values`."""
    to: dict[str, Any] = {"flag_values": values}
    define_model_flags(values)
    define_mesh_flags(values)
    flags.DEFINE_list(
        "drafters", ["ngram"], "ngram, self, self:int8, models by name; none: plain alone.", **to
    )
    flags.DEFINE_string(
        "num_draft", "auto", "Tokens they offer a round; auto: as many as pay.", **to
    )
    judged = "exact, rejection or block; auto: as suits the drafter."
    flags.DEFINE_string("verifier", "auto", judged, **to)
    flags.DEFINE_boolean("exact", False, "Measure exact mode.", **to)
    flags.DEFINE_string("prompts", None, "A file: a prompt a line, or .jsonl with kinds.", **to)
    cut = "Not prompts but Python's documentation cut to so many tokens: 128,1024."
    flags.DEFINE_list("contexts", [], cut, **to)
    flags.DEFINE_integer("max_tokens", 128, "Longest answer.", **to)
    flags.DEFINE_integer("runs", 5, "Runs after one warm-up.", **to)
    flags.DEFINE_list(
        "compare", [], "Peers: transformers[:DTYPE], llama.cpp[:FILE.gguf]; else as ours.", **to
    )
    flags.DEFINE_string("plot", None, "Save a picture in this file.", **to)
    flags.DEFINE_boolean("json", False, "Write one JSON object.", **to)


def run(values: flags.FlagValues) -> None:
    """Measure and print as the flags say."""
    compared = [_peer(text) for text in values.compare]
    if values.prompts and values.contexts:
        raise InvalidArgument("--prompts and --contexts: one of them")
    for text in values.contexts:
        if not text.isdecimal():
            raise InvalidArgument(f"--contexts={text}: a number of tokens")
    for name, count in (("runs", values.runs), ("max_tokens", values.max_tokens)):
        if count < 1:
            raise InvalidArgument(f"--{name}={count}: must be 1 or more")
    draft_length(values.num_draft)
    from jaxinfer import distributed
    from jaxinfer.bench import peers, plot, speed
    from jaxinfer.bench.prompts import PROMPTS, chat_or_plain, contexts, read_prompts
    from jaxinfer.checkpoint import hub
    from jaxinfer.speculative.speculation import Speculation

    Speculation(verifier=values.verifier, exact=values.exact)  # refused before anything is loaded
    if values.plot:
        plot.check(values.plot)
    if clash := {"plain", "memory", "model"} & set(values.drafters):
        raise InvalidArgument(f"--drafters={clash.pop()}: the name is taken, write it as a path")
    texts = read_prompts(values.prompts) if values.prompts else PROMPTS
    begin = time.perf_counter()
    llm = load_model(values)
    load_seconds = time.perf_counter() - begin
    prompts = (
        contexts(llm, values.contexts, values.max_tokens)
        if values.contexts
        else {kind: [chat_or_plain(llm, text) for text in each] for kind, each in texts.items()}
    )
    path = hub.resolve(values.model) if compared else Path()
    context = values.max_tokens + max(len(ids) for each in prompts.values() for ids in each)
    others: dict[str, speed.System] = {}
    for peer, what in compared:
        if peer == "transformers":
            kind = what or llm.model.dtype.name
            found = peers.apart(peers.transformers, path, kind, values.max_tokens)
        else:
            file, threads = Path(what) if what else path, os.cpu_count() or 1
            found = peers.apart(peers.llama_cpp, file, values.max_tokens, context, threads)
        own = f" ({Path(what).name})" if what else ""
        others |= {f"{system}{own}": answer for system, answer in found.items()}
    names = [name for name in values.drafters if name != "none"]
    measured = speed.compare(
        llm,
        {name: load_drafter(llm, name, values.num_draft, values.quantize) for name in names},
        prompts,
        max_tokens=values.max_tokens,
        runs=values.runs,
        exact=values.exact,
        verifier=values.verifier,
        peers=others,
    )
    result = {
        "model": values.model,
        "quantize": values.quantize,
        "num_draft": values.num_draft,
        "load_seconds": load_seconds,
        **measured,
    }
    print(json.dumps(result) if values.json else table(result))
    if values.plot and distributed.is_first():
        (plot.draw_contexts if values.contexts else plot.draw)(result, values.plot)


def _peer(text: str) -> tuple[str, str]:
    """A peer's name, and what stands behind its colon."""
    name, _, what = text.partition(":")
    if name not in PEERS:
        raise InvalidArgument(f"--compare={text}: there are {', '.join(PEERS)}")
    if name == "transformers" and what not in ("", *DTYPES):
        raise InvalidArgument(f"--compare={text}: one of {', '.join(DTYPES)}")
    if name == "llama.cpp" and what and not Path(what).is_file():
        raise InvalidArgument(f"--compare={text}: there is no file {what}")
    return name, what


def table(result: dict[str, Any]) -> str:
    """A result as a person reads it."""
    kinds = list(result["systems"]["plain"]["tokens_per_second"])
    wide = max(map(len, result["systems"])) + 2
    columns = "".join(f"{kind:>10}" for kind in kinds)
    kept = f", {result['quantize']}" if result["quantize"] else ""
    how = ", exact mode" if result["exact"] else ""
    if result["verifier"] != "auto":
        how += f", verifier {result['verifier']}"
    lines = [
        f"{result['model']}, {result['dtype']}{kept}{how}, on {result['device']}: greedy answers"
        f" of up to {result['max_tokens']} tokens, medians of {result['runs']} runs",
        "",
        f"{'tokens/s':<{wide}}{columns}   spread of all",
    ]
    for name, found in result["systems"].items():
        rates = found["tokens_per_second"]
        cells = "".join(f"{rates[kind]['median']:>10.1f}" for kind in kinds)
        ends = f"{rates['all']['least']:.1f} to {rates['all']['most']:.1f}"
        lines.append(f"{name:<{wide}}{cells}   {ends}")
    model = result["model_tokens_per_second"]["median"]
    gigabytes = result["bytes_per_second"]["median"] / 1e9
    lines += [
        f"{'memory limit':<{wide}}{result['limit_tokens_per_second']:>{10 * len(kinds)}.1f}"
        f"   {gigabytes:.1f} GB/s over {result['weight_bytes']:,} bytes of weights",
        f"{'model alone':<{wide}}{model:>{10 * len(kinds)}.1f}"
        f"   {result['outside_model']:.1%} of a plain round is no step of the model",
        "",
        f"{'times plain':<{wide}}{columns}",
    ]
    others = {name: x for name, x in result["systems"].items() if name != "plain"}
    for name, found in others.items():
        cells = "".join(f"{found['speedup'][kind]:>10.2f}" for kind in kinds)
        lines.append(f"{name:<{wide}}{cells}")
    drafters = {name: x for name, x in others.items() if x["tokens_per_round"]}
    if drafters:
        lines += [
            "",
            f"{'tokens a round':<{wide}}{columns}   drafted tokens kept, time spent drafting",
        ]
    for name, found in drafters.items():
        cells = "".join(f"{found['tokens_per_round'][kind]:>10.2f}" for kind in kinds)
        kept = "none drafted" if found["acceptance"] is None else f"{found['acceptance']:.0%}"
        lines.append(f"{name:<{wide}}{cells}   {kept}, {found['drafting']:.1%}")
    costs = result["verify_seconds"]
    lines += ["", f"{'tokens verified':<{wide}}" + "".join(f"{m:>10}" for m in costs)]
    lines.append(f"{'milliseconds':<{wide}}" + "".join(f"{s * 1e3:>10.1f}" for s in costs.values()))
    one = next(iter(costs.values()))
    lines.append(f"{'times one':<{wide}}" + "".join(f"{s / one:>10.2f}" for s in costs.values()))
    return "\n".join(lines)
