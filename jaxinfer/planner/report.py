"""A plan as a person reads it: lines of text, a table of several, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxinfer.errors import InvalidArgument
from jaxinfer.hardware import CHIPS
from jaxinfer.planner.plan import Plan


def text(plan: Plan) -> str:
    """Everything that a plan says."""
    held = plan.bytes_per_chip
    chips = f"{plan.chips} chip{'s' * (plan.chips > 1)}"
    if plan.data > 1:
        chips += f", batch over {plan.data}"
    lines = [
        f"{plan.model} in {_kind(plan)} on {plan.topology} ({chips}):"
        f" {plan.batch} rows of {plan.context:,} tokens",
        plan.verdict,
        *plan.notes,
        "",
        f"{'GB a chip':<24}{'weights':>10}{'cache':>10}{'temporary':>12}{'total':>10}{'limit':>10}",
        f"{'':<24}{_gb(held.weights):>10}{_gb(held.cache):>10}{_gb(held.temporaries):>12}"
        f"{_gb(held.total):>10}{_gb(held.limit):>10}",
        "",
        f"{'a step':<24}{'reads, GB a chip':>18}{'tokens/s at best':>20}{'tokens a round':>18}",
        f"{'decode':<24}{_gb(plan.decode_bytes):>18}{plan.tokens_per_s['plain']:>20,.0f}{1:>18}",
    ]
    if plan.num_draft:
        name = f"verify {plan.num_draft + 1} ({plan.drafter})"
        read = plan.verify_bytes + plan.draft_bytes
        lines.append(
            f"{name:<24}{_gb(read):>18}{plan.tokens_per_s['speculative']:>20,.0f}"
            f"{plan.tokens_per_round:>18.2f}"
        )
        lines.append(f"if a drafted token is kept with probability {plan.acceptance}")
    chip = CHIPS.get(plan.topology.partition(":")[0].lower())
    speed = "a step waits for " + ("memory" if plan.bound == "memory" else "arithmetic")
    lines.append(f"{speed}; {f'figures of the chip: {chip.source}' if chip else 'measured here'}")
    if not plan.programs:
        return "\n".join([*lines, "", "from shapes alone: nothing was compiled"])
    lines += [
        "",
        f"{'compiled':<12}{'seconds':>9}{'temporary, MB':>15}{'touched, GB':>13}"
        f"{'largest sent, MB':>18}   collectives",
    ]
    for program in plan.programs:
        sent = ", ".join(f"{n} {kind}" for kind, n in sorted(program.collectives.items()))
        lines.append(
            f"{program.name:<12}{program.seconds:>9.1f}{program.temporaries / 1e6:>15,.0f}"
            f"{_gb(program.accessed):>13}{program.largest / 1e6:>18.2f}   {sent or 'none'}"
        )
    lines.append(
        f"in {plan.compile_seconds:.0f} s, by the TPU compiler (libtpu), from shapes alone"
    )
    return "\n".join(lines)


def table(plans: Sequence[Plan]) -> str:
    """A line a plan."""
    wide = max(len(p.topology) for p in plans) + 2
    lines = [
        f"{plans[0].model} in {_kind(plans[0])}: {plans[0].batch} rows of"
        f" {plans[0].context:,} tokens; bytes a chip, tokens/s at best",
        "",
        f"{'':<{wide}}{'chips':>7}{'fits':>6}{'GB':>9}{'of':>9}{'plain':>10}{'drafts':>10}   ",
    ]
    for p in plans:
        held = p.bytes_per_chip
        rates = [p.tokens_per_s[k] if p.fits else None for k in ("plain", "speculative")]
        cells = "".join(f"{'-' if r is None else f'{r:,.0f}':>10}" for r in rates)
        how = f"compiled in {p.compile_seconds:.0f} s" if p.programs else "by shapes"
        how += f", data={p.data}" if p.data > 1 else ""
        lines.append(
            f"{p.topology:<{wide}}{p.chips:>7}{'yes' if p.fits else 'no':>6}"
            f"{_gb(held.total):>9}{_gb(held.limit):>9}{cells}   {how}"
        )
    best = next((p for p in sorted(plans, key=lambda p: p.chips) if p.fits), None)
    lines += ["", f"fewest chips: {best.topology}" if best else "none of these fits"]
    return "\n".join(lines)


def draw(plans: Sequence[Plan], file: str | Path) -> Any:
    """Bytes a chip against its limit, and tokens a second, of each plan; a matplotlib Figure.

    Raises InvalidArgument where matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidArgument(f"--plot: {error}; pip install matplotlib") from error
    figure = Figure(figsize=(10, 1.8 + 0.45 * len(plans)), layout="constrained")
    memory, speed = figure.subplots(1, 2, sharey=True)
    names = [p.topology for p in plans]
    left = [0.0] * len(plans)
    for part in ("weights", "cache", "temporaries"):
        sizes = [(getattr(p.bytes_per_chip, part) or 0) / 1e9 for p in plans]
        memory.barh(names, sizes, left=left, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    limits = [p.bytes_per_chip.limit / 1e9 for p in plans]
    memory.plot(limits, names, "k|", markersize=18, markeredgewidth=2, label="limit")
    memory.set(xlabel="GB a chip", xlim=(0, 1.6 * max(limits)))
    memory.invert_yaxis()
    memory.legend(fontsize="small")
    for i, (kind, label) in enumerate((("plain", "plain"), ("speculative", "with drafts"))):
        rates = [p.tokens_per_s[kind] if p.fits else 0 for p in plans]
        places = [row + (i - 0.5) * 0.4 for row in range(len(plans))]
        speed.barh(places, rates, height=0.4, label=label)
    speed.set(xlabel="tokens/s at best (none where it does not fit)")
    speed.legend(fontsize="small")
    first = plans[0]
    figure.suptitle(
        f"{first.model}, {_kind(first)}, {first.batch} rows of {first.context:,} tokens"
    )
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"--plot={file}: {error}") from error
    return figure


def _kind(plan: Plan) -> str:
    """What weights are kept in, and the cache where that is something else."""
    store = f", the cache in {plan.cache_dtype}," if plan.cache_dtype else ""
    return f"{plan.quantize or plan.dtype}{store}"


def _gb(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e9:.2f}"
