"""Other systems on the same prompts, imported only when they are asked for.

Each runs in a process of its own (`apart`): llama.cpp answers half as fast beside the threads of
torch or of a second llama.cpp.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jaxinfer.bench.speed import Answer, System
from jaxinfer.errors import InvalidArgument

LOOKUP_TOKENS = 7  # that transformers' prompt lookup drafts; as many as ours

Make = Callable[..., dict[str, System]]


def apart(make: Make, *args: Any) -> dict[str, System]:
    """The systems of `make(*args)`, in a process that ends with this one.

    Args:
      make: `transformers`, `llama_cpp` or another function of a module.
      args: what it takes; they are sent to the process.

    Raises:
      InvalidArgument: as `make` does, or because the process died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
    process.start()
    theirs.close()

    def told(*asked: Any) -> Any:
        try:
            if asked:
                ours.send(asked)
            answer = ours.recv()
        except (EOFError, OSError) as error:
            process.join()
            raise InvalidArgument(
                f"--compare: the process of {make.__name__} died, exit code {process.exitcode}"
            ) from error
        if isinstance(answer, InvalidArgument):
            raise answer
        return answer

    def ask(name: str, ids: list[int]) -> Answer:
        answer: Answer = told(name, ids)
        return answer

    return {name: partial(ask, name) for name in told()}


def _serve(line: Connection, make: Make, args: tuple[Any, ...]) -> None:
    try:
        systems = make(*args)
        line.send(list(systems))
        while True:
            name, ids = line.recv()
            line.send(systems[name](ids))
    except EOFError:  # whoever asked is gone
        return
    except Exception as error:  # whatever a system of others may raise: its reason is told
        known = isinstance(error, InvalidArgument)
        line.send(
            error if known else InvalidArgument(f"--compare: {type(error).__name__}: {error}")
        )


def transformers(path: Path, dtype: str, max_tokens: int) -> dict[str, System]:
    """Hugging Face's greedy decoding on the CPU, plain and with its own prompt lookup.

    Raises InvalidArgument where torch and transformers are not installed.
    """
    try:
        import torch
        import transformers as hf
    except ImportError as error:
        raise InvalidArgument(
            f"--compare=transformers: {error}; pip install torch transformers accelerate gguf"
        ) from error
    folder, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    kind = getattr(torch, dtype)
    try:
        model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=kind, **options).eval()
    except (OSError, ValueError, ImportError) as error:
        raise InvalidArgument(f"--compare=transformers cannot read {path}: {error}") from error

    class Clock:
        """A streamer that notes when the first new tokens came, and how many they were."""

        def __init__(self) -> None:
            self.puts: list[tuple[float, int]] = []  # of the prompt, then of tokens

        def put(self, value: Any) -> None:
            self.puts.append((time.perf_counter(), value.numel()))

        def end(self) -> None:
            pass

    def system(**how: Any) -> System:
        def run(ids: list[int]) -> Answer:
            clock, prompt = Clock(), torch.tensor([ids])
            with torch.inference_mode():
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=False,
                    max_new_tokens=max_tokens,
                    pad_token_id=0,
                    streamer=clock,
                    **how,
                )
            # The first token comes with the prompt's forward, which is not counted.
            first, *rest = clock.puts[1:]
            last = rest[-1][0] if rest else first[0]
            return Answer(sum(n for _, n in rest), last - first[0])

        return run

    lookup = system(prompt_lookup_num_tokens=LOOKUP_TOKENS)
    return {"transformers": system(), "transformers, prompt lookup": lookup}


def llama_cpp(path: Path, max_tokens: int, context: int, threads: int) -> dict[str, System]:
    """llama.cpp on a .gguf file, whose weights it computes with as they are stored.

    Args:
      path: the model's own file, or one of the same model in another type.
      max_tokens: of an answer.
      context: tokens of the longest prompt and its answer.
      threads: that it computes with.

    Raises InvalidArgument where it is not installed, or cannot read the file.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise InvalidArgument(f"--compare=llama.cpp: {error}; pip install xllamacpp") from error
    if path.suffix != ".gguf":
        raise InvalidArgument(f"--compare=llama.cpp reads .gguf files, not {path.name}")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = context, 1, False
    params.cpuparams.n_threads = threads
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise InvalidArgument(f"--compare=llama.cpp cannot read {path}: {error}") from error

    def run(ids: list[int]) -> Answer:
        asked = {"prompt": ids, "n_predict": max_tokens, "temperature": 0, "cache_prompt": False}
        told = server.handle_completions(asked)
        timings = (json.loads(told) if isinstance(told, str) else told)["timings"]
        return Answer(timings["predicted_n"], timings["predicted_ms"] / 1000)

    return {"llama.cpp": run}
