"""What ReLU does to a curve in few dimensions (MobileNetV2, 1801.04381, figure 1).

A spiral x in the plane is embedded in n dimensions by a random matrix T, clipped, and mapped back by the
pseudo-inverse: T+ ReLU(T x). With few dimensions parts of it collapse; with many the spiral survives. Half of the
coordinates are clipped, so the reconstruction tends to x / 2: the error is given as it is, and after the best scaling.
"""

import time
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxnets import plots
from jaxnets.figures.options import Options

TRAINS = False
DIMENSIONS = (2, 3, 5, 15, 30)  # those of the paper
SWEEP = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60)
POINTS, TURNS = 400, 2.25
DRAWS = 1000  # random matrices for each n
SEED = 0


def spiral() -> np.ndarray:
    """Points of an Archimedean spiral, `(POINTS, 2)`, the outermost at a distance of 1."""
    angle = np.linspace(0.0, 2 * np.pi * TURNS, POINTS)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * (angle / angle[-1])[:, None]


def reconstruct(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """T+ ReLU(T x) for each row x, from `(P, 2)` points and an `(n, 2)` matrix to `(P, 2)`."""
    return np.maximum(points @ matrix.T, 0.0) @ np.linalg.pinv(matrix).T


def relative_error(points: np.ndarray, found: np.ndarray) -> float:
    """The RMS distance, divided by that of the points from the origin; 1 if all is lost."""
    return float(np.linalg.norm(points - found) / np.linalg.norm(points))


def scaled(points: np.ndarray, found: np.ndarray) -> np.ndarray:
    """`found` times the number that brings it closest to the points."""
    norm = float((found * found).sum())
    return found * (float((points * found).sum()) / norm if norm else 0.0)


def matrices(dimensions: int, draws: int) -> np.ndarray:
    """Random embeddings of the plane, `(draws, dimensions, 2)`, with independent normal entries."""
    return np.random.default_rng([SEED, dimensions]).standard_normal((draws, dimensions, 2))


def errors(points: np.ndarray, embeddings: np.ndarray) -> tuple[list[float], list[float]]:
    """The relative error with each embedding: as it is, and after the best scaling."""
    found = [reconstruct(points, matrix) for matrix in embeddings]
    return (
        [relative_error(points, each) for each in found],
        [relative_error(points, scaled(points, each)) for each in found],
    )


def measure(options: Options) -> dict[str, Any]:
    """The spiral, its reconstructions with the matrix of median error, and quartiles of the errors by n."""
    began = time.perf_counter()
    points = spiral()
    panels, sweep = {}, []
    for dimensions in SWEEP:
        embeddings = matrices(dimensions, DRAWS)
        plain, after = errors(points, embeddings)
        quartiles = {
            "error": np.percentile(plain, (25, 50, 75)).tolist(),
            "scaled_error": np.percentile(after, (25, 50, 75)).tolist(),
        }
        sweep.append({"n": dimensions} | quartiles)
        if dimensions in DIMENSIONS:
            typical = int(np.argsort(after)[DRAWS // 2])
            found = reconstruct(points, embeddings[typical])
            panels[str(dimensions)] = found.round(5).tolist()
    seconds = time.perf_counter() - began
    compute = (
        f"{DRAWS:,} random matrices T for each n; the panels show the one with median error, each at its own scale; "
        f"{seconds:.1f} s with NumPy on one CPU core"
    )
    return {"spiral": points.round(5).tolist(), "panels": panels, "sweep": sweep, "draws": DRAWS, "compute": compute}


def draw(data: dict[str, Any]) -> Figure:
    """The spiral and its reconstructions, and below them the error against n."""
    figure = plots.new_figure(7.0, 3.9)
    panels = {"input": data["spiral"]} | {f"n = {n}": found for n, found in data["panels"].items()}
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.55))
    colours = np.linspace(0, 1, len(data["spiral"]))
    for axes, (title, points) in zip(top.subplots(1, len(panels)), panels.items()):
        points = np.asarray(points)
        axes.scatter(points[:, 0], points[:, 1], c=colours, cmap="viridis", s=3, linewidths=0, rasterized=True)
        reach = 1.12 * np.abs(points).max() or 1.0
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[], title=title)
        axes.spines[:].set_visible(True)
        axes.spines[:].set_alpha(0.3)
    axes = bottom.subplots()
    n = [point["n"] for point in data["sweep"]]
    shown = (
        ("error", "T⁺ ReLU(T x)"),
        ("scaled_error", "after the best scaling, α T⁺ ReLU(T x)"),
    )
    for index, (field, label) in enumerate(shown):
        low, middle, high = np.asarray([point[field] for point in data["sweep"]]).T
        colour = plots.COLOURS[index]
        axes.fill_between(n, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(n, middle, color=colour, marker=plots.MARKERS[index], markersize=4, label=label)
    axes.set_xscale("log")
    axes.set_xticks(n, [str(count) for count in n])
    axes.minorticks_off()
    axes.set(xlabel="dimensions n", ylabel="relative error", ylim=(0, None))
    axes.legend(loc="upper right", title="median and quartiles over T", title_fontsize=8, alignment="left")
    plots.footnote(bottom, data["compute"])
    return figure
