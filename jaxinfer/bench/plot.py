"""Pictures: a bench's speed and cost of verifying or of context; size against quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    figure = _figure(10, 4)
    seconds = {int(m): s for m, s in result["verify_seconds"].items()}
    speed, *rest = figure.subplots(
        1, 2 if seconds else 1, squeeze=False, width_ratios=(2, 1) if seconds else (1,)
    )[0]
    systems = result["systems"]
    width = 0.8 / len(systems)
    for i, (name, found) in enumerate(systems.items()):
        rates = found["tokens_per_second"]
        middle, ends = _spread(list(rates.values()))
        where = [k + (i - (len(systems) - 1) / 2) * width for k in range(len(rates))]
        speed.bar(where, middle, width, yerr=ends, capsize=2, label=name)
        speed.set_xticks(range(len(rates)), list(rates))
    speed.set_ylabel("tokens/s, median and range")
    speed.set_title(_title(result), loc="left", fontsize="medium")
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
    return _finish(figure, file)


def draw_contexts(result: dict[str, Any], file: str | Path | None = None) -> Any:
    """Draw the time of a token against the length of the prompt before it; as `draw` otherwise."""
    figure = _figure(7, 4)
    axes = figure.subplots()
    for name, found in result["systems"].items():
        rates = {n: r for n, r in found["tokens_per_second"].items() if n != "all" and r["least"]}
        times = [{end: 1e3 / rate for end, rate in r.items()} for r in rates.values()]
        middle, ends = _spread([{**t, "least": t["most"], "most": t["least"]} for t in times])
        axes.errorbar(list(map(int, rates)), middle, ends, capsize=2, marker="o", label=name)
    speed = result["bytes_per_second"]["median"]
    read = [
        1e3 * (result["weight_bytes"] + held) / speed for held in result["cache_bytes"].values()
    ]
    axes.plot(list(map(int, result["cache_bytes"])), read, "k:", label="reading weights and cache")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("milliseconds a token, median and range")
    axes.set_title(_title(result), loc="left", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")
    return _finish(figure, file)


def _spread(rates: Sequence[Mapping[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far least and most are from them."""
    middle = [r["median"] for r in rates]
    return middle, [
        [r["median"] - r["least"] for r in rates],
        [r["most"] - r["median"] for r in rates],
    ]


def _title(result: Mapping[str, Any]) -> str:
    names = (result.get(key) for key in ("model", "dtype", "quantize", "device"))
    return ", ".join(name for name in names if name)


def draw_quality(rows: Sequence[Mapping[str, Any]], file: str | Path | None = None) -> Any:
    """Draw bytes against mean KL of the rows of `jaxinfer quality`; as `draw` otherwise."""
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    rows = [row for row in rows if "mean_kl" in row]
    axes.scatter([row["bytes"] / 1e6 for row in rows], [row["mean_kl"] for row in rows])
    for i, row in enumerate(sorted(rows, key=lambda row: row["mean_kl"])):
        speed = f", {row['speedup']:.2f}x" if "speedup" in row else ""
        where = row["bytes"] / 1e6, row["mean_kl"]
        text = f"{row['recipe'][:40]}{speed}"
        apart = 5, -10 if i % 2 else 4  # neighbours above and below their points
        axes.annotate(text, where, apart, textcoords="offset points", fontsize="small")
    # A KL of 0, as of a model kept as it was stored, has its place at the foot of the scale.
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.margins(0.25, 0.1)
    axes.set_xlabel("megabytes of weights")
    axes.set_ylabel("mean KL to float32, nats a token")
    axes.set_title("size against quality, and speed", loc="left", fontsize="medium")
    return _finish(figure, file)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidArgument(f"--plot: {error}; pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _finish(figure: Any, file: str | Path | None) -> Any:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    if file is not None:
        try:
            figure.savefig(file, dpi=120)
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"--plot={file}: {error}") from error
    return figure
