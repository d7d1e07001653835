"""Greedy decoding of one prompt: tokens per second against what the memory allows, and a peer.

A step must read every weight once, so bandwidth / bytes of weights bounds the tokens per second of
one row. Runs of ours and of the peer alternate: a machine that is slow for a while is so for both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM
from jaxinfer.model import project
from jaxinfer.sampling import SamplingParams


def measure(
    runners: Mapping[str, Callable[[], int]], *, runs: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Tokens per second of each runner (which returns how many tokens it made), run by run."""
    for _ in range(warm_up):
        for run in runners.values():
            run()
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(runs):
        for name, run in runners.items():
            begin = time.perf_counter()
            count = run()
            rates[name].append(count / (time.perf_counter() - begin))
    return rates


def bandwidth_runner(dtype: jnp.dtype, device: jax.Device) -> Callable[[], int]:
    """Reads a matrix much larger than any cache, as the model's own product does; returns bytes."""
    matrix = jax.device_put(jnp.ones((32768, 4096), dtype), device)
    rows = jax.device_put(jnp.ones((1, 2, 4096), dtype), device)  # two: one is bfloat16's slow path
    product = jax.jit(project)

    def run() -> int:
        product(matrix, rows).block_until_ready()
        return matrix.nbytes

    return run


def jaxinfer_runner(llm: LLM, ids: list[int], max_tokens: int) -> Callable[[], int]:
    """Our greedy decoding of a prompt."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)

    def run() -> int:
        return len(llm.generate(ids, params).token_ids)

    return run


def transformers_runner(path: Path, ids: list[int], max_tokens: int) -> Callable[[], int]:
    """transformers' greedy decoding of the same prompt on the same weights, in float32 on the CPU.

    Raises InvalidArgument where torch and transformers are not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise InvalidArgument(
            f"--compare=transformers: {error}; install torch and transformers"
        ) from error
    folder, options = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    ).eval()
    prompt = torch.tensor([ids])

    def run() -> int:
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                pad_token_id=0,
            )
        return out.shape[1] - len(ids)

    return run


def summary(rates: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}
