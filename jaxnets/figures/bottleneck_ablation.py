"""Linear versus non-linear bottlenecks, and where shortcuts go (MobileNetV2, 1801.04381, figure 6)."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxnets import plots
from jaxnets.figures import training
from jaxnets.figures.options import Options

TRAINS = True
BASE = "mobilenet_v2_cifar:width=0.5:activation=relu6"
LINEAR = f"{BASE}:shortcut=identity"
NETS = {
    "linear": LINEAR,
    "nonlinear": f"{LINEAR}:bottleneck=nonlinear",
    "expansions": f"{BASE}:shortcut=expansions",
    "none": f"{BASE}:shortcut=none",
}
PANELS = {
    "(a) bottleneck": {"linear": "linear", "nonlinear": "ReLU6"},
    "(b) shortcuts": {"linear": "between bottlenecks", "expansions": "between expansions", "none": "none"},
}


def measure(options: Options) -> dict[str, Any]:
    """The accuracy of each variant over the epochs, for every seed."""
    comparison = training.train(list(NETS.values()), training.MANY_IMAGES, options)
    nets = {net["label"]: training.net_data(net) for net in comparison["nets"]}
    found = {name: nets[label] for name, label in NETS.items()}
    return {"nets": found, "seeds": options.seeds} | training.outcome(comparison)


def draw(data: dict[str, Any]) -> Figure:
    """Two panels of accuracy over epochs: the mean over seeds, and their range."""
    figure = plots.new_figure(7.0, 3.5)
    for axes, (title, variants) in zip(figure.subplots(1, 2, sharey=True), PANELS.items()):
        for name, label in variants.items():
            draw_net(axes, list(NETS).index(name), label, data["nets"][name])
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))  # no corner inside is free
    figure.axes[0].set_ylabel("accuracy (%)")
    figure.suptitle("MobileNetV2, width 0.5, with ReLU6")
    training.footnote(figure, data, "bands: range, ±: standard deviation over")
    return figure


def draw_net(axes: Axes, index: int, label: str, net: dict[str, Any]) -> None:
    """A line and a band, with the final accuracy and its deviation in the legend."""
    if not net["curves"]:
        return
    curves = np.asarray(net["curves"])  # seeds, evaluations, (epoch, accuracy)
    epochs, accuracies = curves[0, :, 0], 100 * curves[:, :, 1]
    accuracy = net["accuracy"]
    deviation = "" if accuracy["std"] is None else f" ± {100 * accuracy['std']:.1f}"
    colour = plots.COLOURS[index]
    axes.fill_between(epochs, accuracies.min(0), accuracies.max(0), color=colour, alpha=0.18, linewidth=0)
    axes.plot(
        epochs,
        accuracies.mean(0),
        color=colour,
        marker=plots.MARKERS[index],
        markersize=3.5,
        label=f"{label}: {100 * accuracy['mean']:.1f}{deviation} %",
    )
