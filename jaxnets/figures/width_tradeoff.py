"""Accuracy against multiply-accumulates and parameters, over widths and families."""

from typing import Any

from matplotlib.figure import Figure

from jaxnets import compare_entries, plots
from jaxnets.figures import training
from jaxnets.figures.options import Options

TRAINS = True
FAMILIES = {
    "MobileNetV1": tuple(f"mobilenet_v1_cifar:width={width}" for width in (0.25, 0.5, 0.75)),
    "MobileNetV2": tuple(f"mobilenet_v2_cifar:width={width}" for width in (0.25, 0.5, 0.75)),
    "SqueezeNet 1.1": tuple(f"squeezenet1_1_cifar:width={width}" for width in (0.5, 1.0)),
    "ShuffleNetV1 g3": tuple(f"shufflenet_v1_g3_cifar:width={width}" for width in (0.5, 1.0)),
    "ShuffleNetV2": ("shufflenet_v2_x0_5_cifar", "shufflenet_v2_x1_0_cifar"),
}
WITHOUT_BATCH_NORM = FAMILIES["SqueezeNet 1.1"]
GENTLER = "; SqueezeNet, without BatchNorm, at a lower learning rate"
COSTS = {"macs": "MACs of one image (M)", "parameters": "parameters (M)"}


def measure(options: Options) -> dict[str, Any]:
    """Accuracy, MACs and parameters of every net, by family."""
    comparison = training.run(entries(options), options)
    nets = {net["label"]: training.net_data(net) for net in comparison["nets"]}
    families = {family: [nets[label] for label in labels] for family, labels in FAMILIES.items()}
    outcome = training.outcome(comparison)
    outcome["compute"] += GENTLER
    return {"families": families, "seeds": options.seeds} | outcome


def entries(options: Options) -> list[compare_entries.Entry]:
    """All nets in one setting, but those without BatchNorm at a lower rate, as in the families' recipes."""
    found = training.entries([net for nets in FAMILIES.values() for net in nets], training.MANY_IMAGES, options)
    for entry in found:
        if entry.label in WITHOUT_BATCH_NORM:  # they learn nothing at the others' rate
            optimizer = entry.config.optimizer
            if optimizer.name == "muon":
                optimizer.learning_rate /= 4
            else:
                optimizer.learning_rate /= 10
                optimizer.clip_norm = 1.0
    return found


def draw(data: dict[str, Any]) -> Figure:
    """Two panels, one for each cost; a line for each family."""
    figure = plots.new_figure(7.0, 3.3)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (cost, label) in zip(panels, COSTS.items()):
        for index, (family, nets) in enumerate(data["families"].items()):
            nets = [net for net in nets if net["accuracy"]]
            axes.errorbar(
                [net[cost] / 1e6 for net in nets],
                [100 * net["accuracy"]["mean"] for net in nets],
                yerr=training.whiskers([net["accuracy"] for net in nets]),
                color=plots.COLOURS[index],
                marker=plots.MARKERS[index],
                capsize=2.5,
                label=family if cost == "macs" else None,
            )
        plots.logarithmic(axes)
        axes.set_xlabel(label)
    panels[0].set_ylabel("accuracy (%)")
    figure.legend(loc="outside upper center", ncols=len(data["families"]), columnspacing=1.2, handletextpad=0.5)
    training.footnote(figure, data, "whiskers: standard deviation over")
    return figure
