"""The style of figures for papers, and of charts in a comparison's page, which follow its colours."""

import contextlib
import io
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from jaxnets.plain_files import replacing

INK = "#1b1c1d"  # text and axes; a unique value, so that it can be found in an SVG
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#A8467F", "#E69F00", "#56B4E9", "#7F3C8D", "#888888")
# Their replacements in a page, which may give the series other colours, for a dark background.
PAGE_COLOURS = {INK: "currentColor"} | {c: f"var(--series-{number}, {c})" for number, c in enumerate(COLOURS)}
MARKERS = "osD^vPX"  # one fewer than the colours, so that every pair occurs
FILE_FORMATS = ("png", "pdf")
DPI = 200
FOOTNOTE_SIZE = 6.5  # points
CHARACTERS_AN_INCH = 19  # in a footnote

SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "text.color": INK,
    "text.parse_math": False,  # file names may have a $
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxnets",  # the same figure has the same ids
    "pdf.fonttype": 42,  # text that stays text
}


@contextlib.contextmanager
def style(others: Mapping[str, Any] = types.MappingProxyType({})) -> Iterator[None]:
    """Draw and save with `SETTINGS`, overridden by `others`."""
    with matplotlib.rc_context({**SETTINGS, **others}):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of the given size in inches, with automatic layout."""
    return Figure(figsize=(width, height), layout="constrained")


def logarithmic(axes: Axes) -> None:
    """Make the x axis logarithmic, with plain numbers, fewer of them if its range is wide."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    if high < 3 * low:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def footnote(figure: Figure, text: str) -> None:
    """Add lines below everything: what the numbers cost, and where they were measured."""
    width = figure.bbox.width / figure.dpi
    text = textwrap.fill(text, int(width * CHARACTERS_AN_INCH))
    figure.supxlabel(text, fontsize=FOOTNOTE_SIZE, alpha=0.7, x=0.01, ha="left", linespacing=1.25)


def files_of(path: Path) -> list[Path]:
    """The files that `save` writes."""
    return [path.with_name(f"{path.name}.{ending}") for ending in FILE_FORMATS]


def save(figure: Figure, path: Path) -> list[Path]:
    """Write the figure as `path` with the ending of each of `FILE_FORMATS`; returns the files."""
    files = files_of(path)
    with style():
        for file in files:
            # No date inside: the same data make the same file.
            metadata = {"CreationDate": None} if file.suffix == ".pdf" else None
            with replacing(file) as scratch:
                figure.savefig(scratch, format=file.suffix[1:], dpi=DPI, metadata=metadata)
    return files


def inline_svg(figure: Figure, name: str, *, colours: Mapping[str, str] = PAGE_COLOURS, described: bool = False) -> str:
    """The figure as an `<svg>` element without background, which takes fonts and colours from the page it is in.

    `colours` maps colours of the figure to CSS values. `name` prefixes its ids, to tell them apart from those of other
    figures of a page, and is what a screen reader says; with `described`, the page describes and sizes it instead.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, value in colours.items():
        svg = svg.replace(colour.lower(), value)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{re.sub(r'[^a-z0-9]+', '-', name.lower())}-", svg)
    view, width = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', svg).group(0, 1)
    # No fixed size: as wide as the page allows, at most a third wider than drawn.
    size = f"width: min(100%, {float(width) * 4 / 3:.0f}px); height: auto"
    said = 'aria-hidden="true"' if described else f'role="img" aria-label="{escape(name)}" style="{size}"'
    return f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {view} {said}>' + svg[svg.index(">") + 1 :]
