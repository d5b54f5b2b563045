"""Draw the ratios to PyTorch that `python -m jaxnets.benchmark --out=FILE` saved, one bar per net and mode.

python benchmarks/plot.py benchmarks/results/cpu-avx512-{training,evaluation,latency}.json --out=PICTURE

If both eager and compiled PyTorch took part, the bar is relative to the faster of them. The line across a bar's end
spans the lowest to the highest round.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from jaxnets import plots
from jaxnets.benchmark_report import conditions
from jaxnets.errors import ArgumentParser, UserError, exit_on_user_error, writing
from jaxnets.plain_files import parse_json, replacing, user_path

LABELS = {"train": "training", "eval": "evaluation", "latency": "latency of one image"}
COLOURS = dict(zip(LABELS, plots.COLOURS))
EXPLANATION = "Bars: medians relative to the faster form of PyTorch; lines: from the lowest to the highest round."


class Bar(NamedTuple):
    """How many times as fast as PyTorch jaxnets is: the median, and the extremes of the rounds."""

    net: str
    mode: str
    ratio: float
    low: float
    high: float


def bars_of(records: Sequence[dict[str, Any]]) -> list[Bar]:
    """One for each race against PyTorch; UserError if there is none, or a net has the same mode twice."""
    bars: dict[tuple[str, str], Bar] = {}
    for bar in itertools.chain.from_iterable(map(bars_in, records)):
        if (bar.net, bar.mode) in bars:
            raise UserError(f"the results hold {bar.net} {bar.mode} twice; give files of different races")
        bars[bar.net, bar.mode] = bar
    if not bars:
        raise UserError("the results hold no race against PyTorch")
    return list(bars.values())


def bars_in(record: dict[str, Any]) -> list[Bar]:
    """The bars of one record."""
    bars = []
    for race in record["races"]:
        if ratios := against_pytorch(race):
            LABELS[race["mode"]]  # KeyError for a mode that cannot be drawn
            closest = min(ratios, key=lambda ratio: ratio["median"])
            bars.append(Bar(race["model"], race["mode"], *(float(closest[part]) for part in ("median", "low", "high"))))
    return bars


def against_pytorch(race: dict[str, Any]) -> list[dict[str, Any]]:
    """The ratios of a race to PyTorch, eager and compiled."""
    return [ratio for name, ratio in race["ratios"].items() if name.startswith("torch")]


def draw(bars: Sequence[Bar], footnote: str) -> Figure:
    """Horizontal bars, grouped by net, with a line at 1, where both are equally fast."""
    nets = list(dict.fromkeys(bar.net for bar in bars))
    modes = [mode for mode in LABELS if any(bar.mode == mode for bar in bars)]
    thickness = 0.8 / len(modes)
    figure = plots.new_figure(7.5, 1.2 + len(nets) * (0.12 + 0.17 * len(modes)))
    axes = figure.subplots()
    for number, mode in enumerate(modes):
        chosen = [bar for bar in bars if bar.mode == mode]
        places = [nets.index(bar.net) + (number - (len(modes) - 1) / 2) * thickness for bar in chosen]
        spread = [[bar.ratio - bar.low for bar in chosen], [bar.high - bar.ratio for bar in chosen]]
        axes.barh(
            places,
            [bar.ratio for bar in chosen],
            thickness * 0.9,
            xerr=spread,
            color=COLOURS[mode],
            error_kw={"ecolor": plots.INK, "elinewidth": 0.9},
            label=LABELS[mode],
        )
        for place, bar in zip(places, chosen):
            axes.annotate(
                f"{bar.ratio:.2f}",
                (bar.high, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    axes.axvline(1, color=plots.INK, linewidth=1)
    axes.set_yticks(range(len(nets)), nets)
    axes.set_ylim(len(nets) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * max(1.0, *(bar.high for bar in bars)))
    axes.set_xlabel("speed relative to PyTorch (1: equally fast)")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper left", ncols=len(modes))
    plots.footnote(figure, footnote)
    return figure


def raced(records: Sequence[dict[str, Any]]) -> str:
    """The dtype, and the number and size of the images, in a sentence."""
    races = [race for record in records for race in record["races"] if against_pytorch(race)]
    dtypes = dict.fromkeys(race["contenders"]["jaxnets"]["dtype"] for race in races)
    sizes: dict[str, dict[str, None]] = {}
    for race in races:
        sizes.setdefault(LABELS[race["mode"]], {})[f"{race['batch_size']} at {race['image_size']} px"] = None
    listed = "; ".join(f"{mode} {' and '.join(of_mode)}" for mode, of_mode in sizes.items())
    return f"{', '.join(dtypes)}, batch sizes: {listed}."


def read(path: Path) -> dict[str, Any]:
    """A benchmark's record; UserError if the file is not one."""
    try:
        record = parse_json(path.read_text())
        bars_in(record), conditions(record), raced([record])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is not a result of python -m jaxnets.benchmark --out=FILE") from None
    return record


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = ArgumentParser(
        prog="python benchmarks/plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=user_path, help="JSON files of the benchmark")
    parser.add_argument(
        "--out", type=user_path, required=True, help="the picture: .svg, .png or .pdf; an existing one is replaced"
    )
    args = parser.parse_args(argv[1:])
    if args.out.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--out={args.out} must end in .svg, .png or .pdf")
    records = [read(path) for path in args.results]
    bars = bars_of(records)
    with plots.style():
        figure = draw(bars, " ".join([EXPLANATION, raced(records), *dict.fromkeys(map(conditions, records))]))
        # White, since text and axes are dark wherever the picture is shown.
        with writing(args.out, ""), replacing(args.out) as scratch:
            figure.savefig(scratch, format=args.out.suffix[1:], dpi=plots.DPI, facecolor="white")


if __name__ == "__main__":
    exit_on_user_error(main)(sys.argv)
