"""The page of a comparison: one HTML file that needs nothing else, for screen, phone and print, light and dark."""

import shlex
import textwrap
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from matplotlib.axes import Axes

from jaxnets import compare_results, machine, plots
from jaxnets.compare_entries import TORCH

CSS = """
:root { color-scheme: light dark; --ink: #1b1c1d; --paper: #fff; --soft: #f3f4f5; --line: #d8dadc; --dim: #5c6166; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e7e8e9; --paper: #16181a; --soft: #212427; --line: #3a3f44; --dim: #a2a8ae;
    --series-0: #4fb0f0; --series-1: #ff8b4a; --series-2: #3fcfa0; --series-3: #e78ac0; --series-4: #f2bf55;
    --series-5: #8fd3ff; --series-6: #c79be0; --series-7: #b4b4b4; }
}
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; } .dim, li { color: var(--dim); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; } thead th { background: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
  min-width: 8rem; white-space: normal; overflow-wrap: break-word; }
thead th:first-child { background: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 2rem; }
figure { margin: 0; min-width: 0; } figcaption { color: var(--dim); font-size: .9rem; }
svg * { stroke-linejoin: round; }
code { font-size: .85rem; } code span { display: inline-block; overflow-wrap: anywhere; max-width: 100%; }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --soft: #eee; --line: #bbb; --dim: #333; }
  body { max-width: none; font-size: 9pt; } .wide { overflow: visible; } table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; } figure { break-inside: avoid; }
}
"""

CHART_SIZE = (5.2, 3.6)  # inches; small, so that its text is still read on a phone
POINTS_MARKED = 25  # of a curve, at most: of more evaluations not each
TWO_COLUMNS = 36  # characters of a label that leave room for another beside it
LEGEND_WIDTH = 70  # characters of the longest line of a label

Record = dict[str, Any]


def html(comparison: Record) -> str:
    """The whole page, from the record that is written as JSON."""
    nets = comparison["nets"]
    of_torch = sum(net["framework"] == TORCH for net in nets)
    count = f"{len(nets) - of_torch} net{'s' * (len(nets) - of_torch != 1)}"
    title = f"{count} on {comparison['dataset']}, compared{' with PyTorch' * bool(of_torch)}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="dim">{escape(comparison["date"])}<br><code>{_words(comparison["command"])}</code></p>',
        _table(compare_results.table(comparison)),
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in compare_results.notes(comparison)) + "</ul>",
        *_charts(nets),
        *_recipes(nets),
        "<h2>Every run</h2>",
        _table(runs_table(nets)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _words(command: str) -> str:
    """A command that breaks between its arguments rather than at a hyphen."""
    return " ".join(f"<span>{escape(shlex.quote(word))}</span>" for word in shlex.split(command))


def _table(section: compare_results.Section) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in section.header)
    rows = ""
    for name, *cells in section.rows:
        # A net's name breaks between its words and its fields.
        name = escape(name).replace("_", "_<wbr>").replace(":", ":<wbr>")
        rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in (name, *map(escape, cells))) + "</tr>\n"
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>'


def _recipes(nets: Sequence[Record]) -> list[str]:
    fields = compare_results.recipe_differences(nets)
    if not fields:
        return []
    rows = [(net["label"], *values) for net, values in zip(nets, zip(*(values for _, values in fields)))]
    header = ("net", *(name for name, _ in fields))
    return ["<h2>How they were trained</h2>", _table(compare_results.Section("", header, rows, text_columns=1))]


def runs_table(nets: Sequence[Record]) -> compare_results.Section:
    """One row a finished run; where there are several machines, with their numbers in the notes."""
    number_of = {where: number for number, where in enumerate(compare_results.machines(nets), start=1)}
    several = len(number_of) > 1
    rows = [
        (
            net["label"],
            str(run["seed"]),
            f"{run['accuracy']:.2%}",
            f"{run['train_accuracy']:.2%}",
            f"{run['epoch_seconds']:.1f}",
            f"{run['train_seconds']:.0f}",
            *[", ".join(dict.fromkeys(str(number_of[machine.sentence(w)]) for w in run["machines"]))] * several,
        )
        for net in nets
        for run in net["runs"]
    ]
    header = ("net", "seed", "accuracy", "train accuracy", "s an epoch", "s of training", *["machine"] * several)
    return compare_results.Section("", header, rows, text_columns=1)


def _charts(nets: Sequence[Record]) -> list[str]:
    finished = [(index, net) for index, net in enumerate(nets) if net["runs"]]
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
    figures = [
        f"<figure><h2>{title}</h2>{_chart(title, draw, shown)}<figcaption>{caption}</figcaption></figure>"
        for title, caption, draw, shown in charts
    ]
    return ['<div class="charts">', *figures, "</div>"]


def _chart(title: str, draw: Callable[[Axes, int, Record], None], nets: Sequence[tuple[int, Record]]) -> str:
    with plots.style():
        width, height = CHART_SIZE
        # Broken between fields, which end in a colon.
        labels = [textwrap.fill(net["label"].replace(":", ": "), LEGEND_WIDTH).replace(": ", ":") for _, net in nets]
        columns = 2 if max(map(len, labels)) <= TWO_COLUMNS else 1
        lines = -(-sum(label.count("\n") + 1 for label in labels) // columns)
        figure = plots.new_figure(width, height + 0.18 * lines)
        axes = figure.subplots()
        for (index, net), label in zip(nets, labels):
            draw(axes, index, net | {"label": label})
        if draw is not draw_curves:
            plots.logarithmic(axes)
        axes.set_ylabel("accuracy (%)")
        figure.legend(loc="outside lower center", ncols=columns, columnspacing=1.2, handletextpad=0.4)
    return plots.inline_svg(figure, title)


def look(index: int) -> dict[str, str]:
    """The colour and the marker of the `index`-th net, the same in every chart."""
    return {"color": plots.COLOURS[index % len(plots.COLOURS)], "marker": plots.MARKERS[index % len(plots.MARKERS)]}


def _point(axes: Axes, x: float, index: int, net: Record) -> None:
    accuracy = net["results"]["accuracy"]
    axes.errorbar(
        x,
        accuracy["mean"] * 100,
        yerr=None if accuracy["std"] is None else accuracy["std"] * 100,
        linestyle="none",
        capsize=2.5,
        label=net["label"],
        **look(index),
    )


def draw_cost(axes: Axes, index: int, net: Record) -> None:
    """A net's accuracy at its MACs."""
    _point(axes, net["macs"] / 1e6, index, net)
    axes.set_xlabel("MACs (M)")


def draw_latency(axes: Axes, index: int, net: Record) -> None:
    """A net's accuracy at the time it takes for one image."""
    _point(axes, net["latency"]["one"]["ms"], index, net)
    axes.set_xlabel("latency of one image (ms)")


def draw_curves(axes: Axes, index: int, net: Record) -> None:
    """A net's accuracy as its runs went on."""
    for number, run in enumerate(net["runs"]):
        axes.plot(
            [point["seconds"] for point in run["curve"]],
            [point["accuracy"] * 100 for point in run["curve"]],
            label=net["label"] if number == 0 else None,
            linewidth=1.1,
            markersize=3.5,
            markevery=-(-len(run["curve"]) // POINTS_MARKED),
            **look(index),
        )
    axes.set_xlabel("training (s)")
