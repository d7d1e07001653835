"""Bytes, tokens a second and a verdict: what a model takes on a machine that need not be here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import steps
from jaxinfer.attend import Store, check_store
from jaxinfer.batch import Model
from jaxinfer.checkpoint.describe import describe
from jaxinfer.checkpoint.placement import nest, param_shapes, schemes_of
from jaxinfer.config import DTYPES, ModelConfig
from jaxinfer.drafters import is_name
from jaxinfer.errors import InvalidArgument
from jaxinfer.hardware import TOPOLOGIES
from jaxinfer.planner.programs import DoesNotFit, Program, compile_all
from jaxinfer.planner.sizes import Asked, count, weights_met
from jaxinfer.planner.target import find_target, tpu_devices
from jaxinfer.recipes import STORED, make_recipe
from jaxinfer.sharding import Rules, fit_config, make_mesh, spread_note
from jaxinfer.speculative.drafter import Drafter, NoDrafter
from jaxinfer.speculative.model_drafter import ModelDrafter
from jaxinfer.speculative.ngram import NGramDrafter
from jaxinfer.speculative.speculation import MAX_DRAFT, Speculation
from jaxinfer.speculative.vocab import VocabMap


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Of one chip's memory."""

    weights: int  # the drafter's too
    cache: int
    temporaries: int | None  # the largest program's, its code included; None: nothing was compiled
    total: int
    limit: int  # what programs can have


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model takes on a machine, and what that machine could give at best.

    Bytes are a chip's. A step's bytes are what it must read: weights, keys and values, its rows of
    the logits; with the speed of the memory they bound the tokens a second. What chips send to each
    other is not counted.
    """

    model: str
    topology: str
    chips: int
    data: int  # chips along which the batch is cut; along the others heads and widths are
    dtype: str
    quantize: str | None
    cache_dtype: str | None
    batch: int
    context: int
    drafter: str
    num_draft: int
    acceptance: float  # probability that a drafted token is kept, given those before it
    fits: bool
    bytes_per_chip: Bytes
    decode_bytes: int  # read in a step of one token a row
    verify_bytes: int  # and of num_draft + 1, without what the drafter reads
    draft_bytes: int  # by the drafter, for a whole draft
    tokens_per_round: float  # expected; 1 without a drafter
    tokens_per_s: dict[str, float]  # of all rows: "plain" and "speculative"
    bound: str  # "memory" or "arithmetic": what a decode step waits for
    compile_seconds: float | None
    programs: list[Program]  # empty where nothing was compiled
    verdict: str
    notes: list[str]


def plan(
    model: str | Path | ModelConfig,
    topology: str = "v5e:4x4",
    *,
    batch: int = 8,
    context: int = 8192,
    quantize: str | None = None,
    dtype: str = "bfloat16",
    cache_dtype: Store | None = None,
    drafter: str = "ngram",
    num_draft: int = 7,
    acceptance: float = 0.7,
    data: int = 1,
    rules: Rules | None = None,
    compile: bool = True,
    cache_dir: Path | None = None,
) -> Plan:
    """Whether a model fits a machine, and how fast it can be there.

    For a TPU slice the real prefill, decode and verify programs are compiled by its compiler, from
    shapes alone; for a GPU or this CPU the figures come from shapes and `hardware.CHIPS`.

    Args:
      model: a preset ("llama-3-70b"), whatever `load` takes, or a config.
      topology: "v5e:4x4", "v6e:2x2", "v5p:2x2x1", "h100:8", "cpu", ...
      batch: rows.
      context: tokens a row, prompt and answer.
      quantize, dtype, cache_dtype, rules: as for `load`.
      drafter: "none", "ngram", or a second model by name.
      num_draft: tokens that it offers a round.
      acceptance: probability that one is kept.
      data: chips along which the batch is cut.
      compile: False: from shapes alone, for a TPU too; in milliseconds.
      cache_dir: as for `load`.

    Raises:
      InvalidArgument: an unknown preset or slice, sizes that do not divide, a number out of range.
      JaxinferError: libtpu is missing, or the model cannot be found.
    """
    _check(batch, context, dtype, num_draft, acceptance)
    check_store(cache_dtype)
    target = find_target(topology)
    make_recipe(quantize, target.chip.kind)
    if quantize == STORED:
        raise InvalidArgument("quantize=stored is of a file, which a plan has not; int4 is like it")
    if data < 1 or target.devices % data:
        raise InvalidArgument(f"data={data}: {topology} has {target.devices} devices")
    known = model if isinstance(model, ModelConfig) else describe(model, cache=cache_dir)
    drafter = {"auto": "ngram"}.get(drafter, drafter) if num_draft else "none"
    if drafter not in ("none", "ngram") and is_name(drafter):
        raise InvalidArgument(f"drafter={drafter!r:.40}: planned are none, ngram and second models")
    small = None if drafter in ("none", "ngram") else describe(drafter, cache=cache_dir)
    asked = Asked(
        model=known.family if isinstance(model, ModelConfig) else str(model),
        config=known,
        small=small,
        target=target,
        batch=batch,
        context=context,
        quantize=quantize,
        dtype=dtype,
        cache_dtype=cache_dtype,
        drafter=drafter,
        num_draft=0 if drafter == "none" else num_draft,
        acceptance=acceptance,
        data=data,
        rules=rules,
    )
    return _plan(asked, compile and target.chip.kind == "tpu")


def sweep(model: str | Path | ModelConfig, topologies: Sequence[str], **options: Any) -> list[Plan]:
    """`plan` for several machines: a slice, or a chip ("v5p"), which stands for all its slices.

    All are planned from shapes; of each chip the smallest that then fits is compiled too, and the
    next where its temporaries do not fit, unless compile=False. Where a size does not divide over
    a slice, the batch is cut along as many of its chips as it takes.
    """
    compile = options.pop("compile", True)
    name_of_it = None if isinstance(model, ModelConfig) else str(model)
    if not isinstance(model, ModelConfig):  # once, not for every slice
        model = describe(model, cache=options.get("cache_dir"))
    plans = []
    for name in topologies:
        slices = [f"{name}:{size}" for size in TOPOLOGIES.get(name.lower(), ())] or [name]
        found = False
        for one in slices:
            made = _first_that_divides(model, one, options)
            if made.fits and compile and not found and find_target(one).chip.kind == "tpu":
                made = plan(model, one, **options | {"data": made.data})
                found = made.fits
            plans.append(dataclasses.replace(made, model=name_of_it or made.model))
    return plans


def _first_that_divides(
    model: str | Path | ModelConfig, topology: str, options: dict[str, Any]
) -> Plan:
    data = options.get("data", 1)
    while True:
        try:
            return plan(model, topology, compile=False, **options | {"data": data})
        except InvalidArgument:
            data *= 2
            if data > find_target(topology).devices:
                raise


def _check(batch: int, context: int, dtype: str, num_draft: int, acceptance: float) -> None:
    for name, value, most in (("batch", batch, 1 << 16), ("context", context, 1 << 24)):
        if not 1 <= value <= most:
            raise InvalidArgument(f"{name}={value}: must be 1 to {most}")
    if dtype not in DTYPES:
        raise InvalidArgument(f"dtype={dtype!r:.40}: one of {', '.join(DTYPES)}")
    if not 0 <= num_draft <= MAX_DRAFT:
        raise InvalidArgument(f"num_draft={num_draft}: must be 0 to {MAX_DRAFT}")
    if not 0 <= acceptance <= 1:
        raise InvalidArgument(f"acceptance={acceptance}: must be 0 to 1")


def _plan(asked: Asked, compile: bool) -> Plan:
    target, sizes = asked.target, count(asked)
    chip, each = target.chip, target.chip.devices
    limit = int(target.limit)
    programs: list[Program] = []
    note = spread_note(fit_config(asked.config, asked.shape()))
    notes = [note] if note else []
    if asked.context > asked.config.max_len:
        notes.append(f"the model was made for {asked.config.max_len:,} tokens, not for so many")
    seconds, why = None, ""
    fits = sizes.weights + sizes.cache <= limit
    if fits and compile:
        begin = time.perf_counter()
        try:
            programs = _compile(asked, notes)
        except DoesNotFit as error:
            fits, why = False, str(error)
        seconds = time.perf_counter() - begin
    temporaries = None
    if programs:
        # What is an argument and neither weight nor cache is the small state of a batch.
        held = sizes.weights + sizes.cache
        temporaries = max(p.temporaries + max(0, p.arguments - held) for p in programs)
        fits = held + temporaries <= limit
    total = sizes.weights + sizes.cache + (temporaries or 0)

    decode = sizes.read + sizes.logits
    verify = sizes.read + sizes.logits * (asked.num_draft + 1)
    drafting = sizes.draft * asked.num_draft
    kept = sum(asked.acceptance**i for i in range(asked.num_draft + 1))

    def step(bytes_read: int, tokens: int) -> tuple[float, str]:
        """Seconds of a forward, and what it waits for."""
        flops = 2 * weights_met(asked) * tokens * asked.batch / asked.shape().parts("B")
        times = {
            "memory": bytes_read / (chip.bandwidth / each),
            "arithmetic": flops / (chip.flops / each),
        }
        bound = max(times, key=lambda name: times[name])
        return times[bound], bound

    plain, bound = step(decode, 1)
    round_, _ = step(verify, asked.num_draft + 1)
    round_ += drafting / (chip.bandwidth / each)
    bytes_ = Bytes(
        *(sizes.weights * each, sizes.cache * each),
        None if temporaries is None else temporaries * each,
        *(total * each, limit * each),
    )
    return Plan(
        model=asked.model,
        topology=target.name,
        chips=target.chips,
        data=asked.data,
        dtype=asked.dtype,
        quantize=asked.quantize,
        cache_dtype=asked.cache_dtype,
        batch=asked.batch,
        context=asked.context,
        drafter=asked.drafter,
        num_draft=asked.num_draft,
        acceptance=asked.acceptance,
        fits=fits,
        bytes_per_chip=bytes_,
        decode_bytes=decode * each,
        verify_bytes=verify * each,
        draft_bytes=drafting * each,
        tokens_per_round=kept,
        tokens_per_s={"plain": asked.batch / plain, "speculative": asked.batch * kept / round_},
        bound=bound,
        compile_seconds=seconds,
        programs=programs,
        verdict=_verdict(asked, fits, bool(programs), total * each, limit * each, why),
        notes=notes,
    )


def _compile(asked: Asked, notes: list[str]) -> list[Program]:
    devices = tpu_devices(asked.target)
    layout = asked.layout(
        make_mesh(model=len(devices) // asked.data, data=asked.data, devices=devices)
    )
    dtype = jnp.dtype(asked.dtype)

    def model(config: ModelConfig) -> Model:
        fitted = fit_config(config, layout)
        params = nest(param_shapes(fitted, dtype, layout, schemes_of(fitted, asked.recipe)))
        made = Model(
            params, fitted, dtype, layout, config.vocab_size, "pallas_tpu", asked.cache_dtype
        )
        try:
            made.check_kernels()
        except InvalidArgument as error:  # as load(kernels="auto") does
            notes.append(f"attention by XLA: {error}")
            made = dataclasses.replace(made, impl="xla")
        return made

    target = model(asked.config)
    drafter: Drafter = NoDrafter()
    if asked.small is not None:
        own = model(asked.small)
        ids: Any = jax.ShapeDtypeStruct((asked.config.vocab_size, 1), jnp.int32)
        drafter = ModelDrafter(
            num_draft=asked.num_draft,
            params=own.params,
            vocab=VocabMap(ids, None),
            config=own.config,
            dtype=dtype,
            kernels=own.kernels(),
        )
    elif asked.num_draft:
        drafter = NGramDrafter(num_draft=asked.num_draft)
    rows = target.rows(asked.batch)
    capacity = steps.capacity_for(asked.context)
    return compile_all(target, Speculation(drafter), batch=rows, capacity=capacity)


def _verdict(asked: Asked, fits: bool, compiled: bool, total: int, limit: int, why: str) -> str:
    share = f"{total / 1e9:.2f} of {limit / 1e9:.2f} GB a chip"
    if fits:
        return f"fits: {share}" if compiled else f"fits, by shapes: {share}, without temporaries"
    would = [text for text, other in _instead(asked) if _room(other)]
    return f"does not fit: {share}{f' ({why:.200})' if why else ''}; would fit, by shapes: " + (
        ", ".join(would[:4]) or "nothing that is a small change"
    )


def _room(asked: Asked) -> bool:
    """Whether a plan fits by shapes, with a tenth of the memory left for temporaries."""
    try:
        sizes = count(asked)
    except InvalidArgument:
        return False
    return sizes.weights + sizes.cache <= 0.9 * asked.target.limit


def _instead(asked: Asked) -> list[tuple[str, Asked]]:
    """Small changes, the smallest of each kind that fits first."""
    changes = []
    if asked.quantize is None:
        changes.append(("int8 weights", dataclasses.replace(asked, quantize="int8")))
    if asked.cache_dtype is None:
        changes.append(("a cache in int8", dataclasses.replace(asked, cache_dtype="int8")))
    for name in ("context", "batch"):
        value = getattr(asked, name) // 2
        while value >= 1 and not _room(dataclasses.replace(asked, **{name: value})):
            value //= 2
        if value >= 1:
            changes.append((f"{name} {value}", dataclasses.replace(asked, **{name: value})))
    kind = asked.target.chip.name
    names = [f"{kind}:{size}" for size in TOPOLOGIES.get(kind, ())]
    if asked.target.chip.kind == "gpu":
        names = [f"{kind}:{n}" for n in (2, 4, 8, 16, 32, 64)]
    for name in names:
        larger = dataclasses.replace(asked, target=find_target(name))
        if larger.target.chips > asked.target.chips and _room(larger):
            return [*changes, (name, larger)]
    return changes
