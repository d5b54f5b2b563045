"""The page of a comparison: one self-contained HTML file, for screen, phone and print, light and dark."""

import itertools
import shlex
import textwrap
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from jaxnets import compare_results, machine, plots, report
from jaxnets.compare_entries import JAXNETS, TORCH, workdir_at
from jaxnets.tables import Section

# Small, with large text: a phone shows it at about its actual size.
CHART_SIZE = (4.4, 3.3)  # inches
LARGE_TEXT = dict.fromkeys(("axes.labelsize", "legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 10)  # points
POINTS_MARKED = 25  # per curve, at most: with more evaluations, not every one
TWO_COLUMNS = 20  # labels of at most this many characters fit in two columns
LEGEND_WIDTH = 44  # characters per line of a label, at most

Record = dict[str, Any]


def html(comparison: Record) -> str:
    """The whole page, from the record that is written as JSON."""
    nets = comparison["nets"]
    of_torch = sum(net["framework"] == TORCH for net in nets)
    count = "1 net" if len(nets) - of_torch == 1 else f"{len(nets) - of_torch} nets"
    return report.fill_template(
        "compare.html.jinja",
        title=f"{count} on {comparison['dataset']}, compared{' with PyTorch' if of_torch else ''}",
        date=comparison["date"],
        command=[shlex.quote(word) for word in shlex.split(comparison["command"])],
        results=compare_results.table(comparison),
        notes=compare_results.notes(comparison),
        charts=_charts(nets),
        recipes=recipes_table(nets),
        runs=runs_table(nets),
        pages=pages(nets),
    )


def recipes_table(nets: Sequence[Record]) -> Section | None:
    """One row per net, with the fields in which the nets' training differs; None if there are none."""
    fields = compare_results.recipe_differences(nets)
    if not fields:
        return None
    rows = [(net["label"], *values) for net, values in zip(nets, zip(*(values for _, values in fields)))]
    return Section("", ("net", *(name for name, _ in fields)), rows, text_columns=1)


def runs_table(nets: Sequence[Record]) -> Section:
    """One row per finished run; if there are several machines, with their numbers from the notes."""
    number_of = {where: number for number, where in enumerate(compare_results.machines(nets), start=1)}
    columns: dict[str, Callable[[Record, Record], str]] = {
        "net": lambda net, run: net["label"],
        "seed": lambda net, run: str(run["seed"]),
        "accuracy": lambda net, run: f"{run['accuracy']:.2%}",
        "train": lambda net, run: _percent(run["final_train_accuracy"]),
        "in training": lambda net, run: f"{run['train_accuracy']:.2%}",
        "s per epoch": lambda net, run: f"{run['epoch_seconds']:,.1f}",
        "s of training": lambda net, run: f"{run['train_seconds']:,.0f}",
        "machine": lambda net, run: ", ".join(
            dict.fromkeys(str(number_of[machine.sentence(where)]) for where in run["machines"])
        ),
    }
    if not compare_results.has_train_accuracy(nets):
        del columns["train"]
    if len(number_of) <= 1:
        del columns["machine"]
    rows = [tuple(show(net, run) for show in columns.values()) for net in nets for run in net["runs"]]
    return Section("", tuple(columns), rows, text_columns=1)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def pages(nets: Sequence[Record]) -> list[str | None]:
    """For each row of `runs_table`, the relative link to the run's own page; PyTorch runs have none."""
    return [
        urllib.parse.quote(str(workdir_at(Path(), net["label"], run["seed"]) / report.FILE))
        if net["framework"] == JAXNETS
        else None
        for net in nets
        for run in net["runs"]
    ]


def _charts(nets: Sequence[Record]) -> list[dict[str, str]]:
    """Title, drawing and caption of each chart; none if no net has a finished run."""
    finished = [(index, net) for index, net in zip(pair_numbers(nets), nets) if net["runs"]]
    if not finished:
        return []
    timed = [(index, net) for index, net in finished if net["latency"]]
    charts = [
        (
            "Accuracy against cost",
            "Multiply-accumulates of one image; whiskers: standard deviation.",
            draw_cost,
            finished,
        ),
        ("Accuracy over training time", "A line for each seed.", draw_curves, finished),
    ]
    if timed:
        twins = any(net["latency"]["model"] != net["model"] for _, net in timed)
        whose = "One image through the ImageNet net of the same name" if twins else "One image"
        sides = dict.fromkeys(str(net["latency"]["image_size"]) for _, net in timed)
        caption = f"{whose}, at {' or '.join(sides)} pixels; median."
        charts.append(("Accuracy against latency", caption, draw_latency, timed))
    return [
        {"title": title, "svg": _chart(title, draw, shown), "caption": caption}
        for title, caption, draw, shown in charts
    ]


def _chart(title: str, draw: Callable[[Axes, int, Record], None], nets: Sequence[tuple[int, Record]]) -> str:
    with plots.style(LARGE_TEXT):
        width, height = CHART_SIZE
        # Lines break between fields, after a colon.
        labels = [textwrap.fill(net["label"].replace(":", ": "), LEGEND_WIDTH).replace(": ", ":") for _, net in nets]
        # matplotlib leaves out labels that begin with an underscore.
        labels = [f"\N{ZERO WIDTH SPACE}{label}" if label.startswith("_") else label for label in labels]
        columns = 2 if max(map(len, labels)) <= TWO_COLUMNS else 1
        lines = -(-sum(label.count("\n") + 1 for label in labels) // columns)
        figure = plots.new_figure(width, height + 0.2 * lines)
        axes = figure.subplots()
        for (index, net), label in zip(nets, labels):
            draw(axes, index, net | {"label": label})
        if draw is not draw_curves:
            plots.logarithmic(axes)
        axes.set_ylabel("accuracy (%)")
        figure.legend(loc="outside lower center", ncols=columns, columnspacing=1.2, handletextpad=0.4)
    return plots.inline_svg(figure, title)


def pair_numbers(nets: Sequence[Record]) -> list[int]:
    """A number for each net, from 0; a PyTorch net shares that of the net before it, its JAX counterpart."""
    return [number - 1 for number in itertools.accumulate(net["framework"] == JAXNETS for net in nets)]


def look(index: int, framework: str = JAXNETS) -> dict[str, str]:
    """How the net with that number is drawn in every chart: its colour and marker, hollow for PyTorch."""
    hollow = {"markerfacecolor": "none"} if framework == TORCH else {}
    colours, markers = plots.COLOURS, plots.MARKERS
    return {"color": colours[index % len(colours)], "marker": markers[index % len(markers)]} | hollow


def _point(axes: Axes, x: float, index: int, net: Record) -> None:
    accuracy = net["results"]["accuracy"]
    axes.errorbar(
        x,
        accuracy["mean"] * 100,
        yerr=None if accuracy["std"] is None else accuracy["std"] * 100,
        linestyle="none",
        capsize=2.5,
        label=net["label"],
        **look(index, net["framework"]),
    )


def draw_cost(axes: Axes, index: int, net: Record) -> None:
    """A net's accuracy against its MACs."""
    _point(axes, net["macs"] / 1e6, index, net)
    axes.set_xlabel("MACs (M)")


def draw_latency(axes: Axes, index: int, net: Record) -> None:
    """A net's accuracy against its latency for one image."""
    _point(axes, net["latency"]["one"]["ms"], index, net)
    axes.set_xlabel("latency of one image (ms)")


def draw_curves(axes: Axes, index: int, net: Record) -> None:
    """A net's accuracy over training time, a line per run."""
    for number, run in enumerate(net["runs"]):
        axes.plot(
            [point["seconds"] for point in run["curve"]],
            [point["accuracy"] * 100 for point in run["curve"]],
            label=net["label"] if number == 0 else None,
            linewidth=1.1,
            markersize=3.5,
            markevery=-(-len(run["curve"]) // POINTS_MARKED),
            linestyle="--" if net["framework"] == TORCH else "-",
            **look(index, net["framework"]),
        )
    axes.set_xlabel("training (s)")
