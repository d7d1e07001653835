"""The picture of a bench: tokens per second by kind of prompt, and what verifying costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxinfer.errors import InvalidArgument


def check(file: str | Path) -> None:
    """Before anything is measured: InvalidArgument where `draw` would fail."""
    if not Path(file).absolute().parent.is_dir():
        raise InvalidArgument(f"--plot={file}: there is no such folder")
    draw({"systems": {"plain": {"tokens_per_second": {}}}, "verify_seconds": {}})


def draw(result: dict[str, Any], file: str | Path | None = None) -> Any:
    """Draw what `speed.compare` gives; save it if `file` is named; a matplotlib Figure.

    Raises InvalidArgument where matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidArgument(f"--plot: {error}; pip install matplotlib") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    seconds = {int(m): s for m, s in result["verify_seconds"].items()}
    speed, *rest = figure.subplots(
        1, 2 if seconds else 1, squeeze=False, width_ratios=(2, 1) if seconds else (1,)
    )[0]
    systems = result["systems"]
    width = 0.8 / len(systems)
    for i, (name, found) in enumerate(systems.items()):
        rates = found["tokens_per_second"]
        middle = [r["median"] for r in rates.values()]
        ends = [
            [m - r["least"] for m, r in zip(middle, rates.values(), strict=True)],
            [r["most"] - m for m, r in zip(middle, rates.values(), strict=True)],
        ]
        where = [k + (i - (len(systems) - 1) / 2) * width for k in range(len(rates))]
        speed.bar(where, middle, width, yerr=ends, capsize=2, label=name)
        speed.set_xticks(range(len(rates)), list(rates))
    speed.set_ylabel("tokens/s, median and range")
    title = ", ".join(result[key] for key in ("model", "dtype", "device") if key in result)
    speed.set_title(title, loc="left", fontsize="medium")
    # Room above the bars, so that the names hide none of them.
    speed.set_ylim(top=1.3 * speed.get_ylim()[1])
    speed.legend(frameon=False, ncols=3, fontsize="small", loc="upper left")
    for cost in rest:
        cost.plot(list(seconds), [s / seconds[1] for s in seconds.values()], marker="o")
        cost.set_xscale("log", base=2)
        cost.set_xticks(list(seconds), [str(m) for m in seconds])
        cost.set_ylim(bottom=0)
        cost.set_xlabel("tokens verified in one forward")
        cost.set_ylabel("time, that of one token is 1")
    for axes in (speed, *rest):
        axes.spines[["top", "right"]].set_visible(False)
    if file is not None:
        try:
            figure.savefig(file, dpi=120)
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"--plot={file}: {error}") from error
    return figure
