"""Curves and matrices as SVG, drawn by matplotlib, that take fonts and colours from the page they are in."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Colours by name: the page's CSS variables, which replace the placeholders that matplotlib writes.
COLOURS = ("muted", "grid", *(f"series-{number}" for number in range(1, 9)))
STYLE = {"font.size": 10}
SIZE = (4.6, 2.7)  # inches; a phone shows a chart at 72 pixels per inch
DASHES = ("-", (0, (4, 2)), (0, (1, 1.3)))  # for lines that share a colour; a page's legend has the same
MAX_CELLS = 400  # per side, at most: the picture of a matrix has pixels for no more


@dataclass(frozen=True)
class Curve:
    """One line: points `x`, `y` and how it looks; non-finite values are gaps."""

    x: np.ndarray
    y: np.ndarray
    colour: str  # of COLOURS
    faint: bool = False
    dash: int = 0  # of DASHES
    marked: bool = False  # at its points, if they are few


def _placeholder(colour: str) -> str:
    return f"#0f0f{COLOURS.index(colour):02x}"


PAGE_COLOURS = {_placeholder(colour): f"var(--{colour})" for colour in COLOURS}


def draw_curves(
    name: str, curves: Sequence[Curve], *, xlabel: str, percent: bool = False, from_zero: bool = False
) -> str:
    """The curves on one pair of axes as an `<svg>` element, its ids prefixed with `name`.

    Positive values that span more than a factor of 30 are drawn on a logarithmic scale, except with `percent` (values
    are fractions) or `from_zero` (the axis begins there).
    """
    # Imported here, by the page's thread: at the top they would delay the first step.
    import matplotlib
    from matplotlib import ticker
    from matplotlib.figure import Figure

    from jaxnets import plots

    values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in curves])
    logarithmic = not (percent or from_zero) and values.size > 0 and values.min() > 0
    logarithmic = logarithmic and values.max() > 30 * values.min()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        axes = figure.add_axes((0.125, 0.17, 0.855, 0.79))
        for curve in curves:
            axes.plot(
                curve.x,
                curve.y,
                color=_placeholder(curve.colour),
                linewidth=1.1 if curve.faint else 1.9,
                linestyle=DASHES[curve.dash],
                alpha=0.55 if curve.faint else 1.0,
                # A single point would draw no line.
                marker="o" if curve.marked and len(curve.x) <= 30 or len(curve.x) == 1 else "",
                markersize=3.4,
            )
        if logarithmic:
            axes.set_yscale("log")
            many = values.max() > 1000 * values.min()
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1,) if many else (1, 2, 5)))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_formatter(_number)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
        if from_zero:
            axes.set_ylim(0, 1.06 * values.max(initial=0) or 1)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
        axes.xaxis.set_major_formatter(_number)
        axes.set_xlabel(xlabel, color=_placeholder("muted"))
        axes.grid(axis="y", color=_placeholder("grid"), linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_placeholder("muted"))
        axes.tick_params(color=_placeholder("muted"), labelcolor=_placeholder("muted"), length=3)
        axes.tick_params(axis="y", length=0)
        return plots.inline_svg(figure, name, colours=PAGE_COLOURS, described=True)


def draw_matrix(name: str, shares: np.ndarray, *, xlabel: str, ylabel: str) -> str:
    """A square matrix of values in [0, 1] as an `<svg>` element, darker for larger values.

    A dot is a value or, if the matrix is too large for that, the largest in a square of values.
    """
    import matplotlib  # as in draw_curves
    from matplotlib.figure import Figure

    from jaxnets import plots

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 5.0))
        axes = figure.add_axes((0.1, 0.1, 0.88, 0.88))
        # Black of varying opacity: the page inverts it on a dark background.
        cells = _largest(shares, -(-len(shares) // MAX_CELLS))
        ink = np.zeros((*cells.shape, 4))
        ink[..., 3] = np.sqrt(cells)
        end = len(shares) - 0.5
        axes.imshow(ink, interpolation="nearest", extent=(-0.5, end, end, -0.5))
        axes.set_xlabel(xlabel, color=_placeholder("muted"))
        axes.set_ylabel(ylabel, color=_placeholder("muted"))
        axes.tick_params(color=_placeholder("muted"), labelcolor=_placeholder("muted"), length=3)
        for spine in axes.spines.values():
            spine.set_color(_placeholder("grid"))
        return plots.inline_svg(figure, name, colours=PAGE_COLOURS, described=True)


def _largest(values: np.ndarray, side: int) -> np.ndarray:
    """The largest value in each `side` x `side` square; squares at the edges may be smaller."""
    padded = np.pad(values, (0, -len(values) % side))
    count = len(padded) // side
    return padded.reshape(count, side, count, side).max((1, 3))


def _number(value: float, _position: int) -> str:
    """A tick's label: 12k for 12000, and no trailing zeros."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"
