"""ShuffleNetV1 with and without channel shuffle, for each number of groups (1707.01083, table 3).

Nets with and without it are trained alike; nets of different numbers of groups less so: Muon makes one matrix of a
kernel's groups (`optim.stack`), so the size of its updates depends on them.
"""

import math
import statistics
from typing import Any

from matplotlib.figure import Figure

from jaxnets import plots
from jaxnets.figures import training
from jaxnets.figures.options import Options

TRAINS = True
KNOBS = {f"g{groups}": groups for groups in (1, 2, 3, 4, 8)}
WIDTH = 0.5  # at which the paper found the shuffle to matter most


def specs(groups: int) -> list[str]:
    """The nets as `compare` names them: with channel shuffle, and, where there is something to shuffle, without."""
    name = f"shufflenet_v1_g{groups}_cifar:width={WIDTH}"
    return [name] if groups == 1 else [name, f"{name}:shuffle=False"]


def measure(options: Options) -> dict[str, Any]:
    """Accuracy by number of groups, with and without shuffle."""
    pairs = {groups: specs(groups) for groups in options.chosen(KNOBS).values()}
    comparison = training.train([name for names in pairs.values() for name in names], training.MANY_IMAGES, options)
    nets = {net["label"]: training.net_data(net) for net in comparison["nets"]}
    return {
        "groups": [
            {"groups": groups, "shuffle": nets[names[0]], "no_shuffle": nets[names[-1]] if len(names) > 1 else None}
            for groups, names in pairs.items()
        ],
        "width": WIDTH,
        "seeds": options.seeds,
    } | training.outcome(comparison)


def draw(data: dict[str, Any]) -> Figure:
    """Accuracy against the number of groups: two lines, whiskers of one standard deviation, gains above."""
    figure = plots.new_figure(5.0, 3.1)
    axes = figure.subplots()
    for index, (field, label) in enumerate((("shuffle", "with channel shuffle"), ("no_shuffle", "without"))):
        # One group has nothing to shuffle: it is a point on both lines.
        nets = [each[field] or each["shuffle"] for each in data["groups"]]
        points = [(at, net["accuracy"]) for at, net in enumerate(nets) if _finished(net)]
        aside = 0.04 * (2 * index - 1)  # so that whiskers do not hide each other
        axes.errorbar(
            [at + aside for at, _ in points],
            [100 * accuracy["mean"] for _, accuracy in points],
            yerr=training.whiskers([accuracy for _, accuracy in points]),
            color=plots.COLOURS[index],
            marker=plots.MARKERS[index],
            capsize=3,
            label=label,
        )
    for at, each in enumerate(data["groups"]):
        if _finished(each["shuffle"]) and _finished(each["no_shuffle"]):
            gain = _gain(each["shuffle"], each["no_shuffle"])
            axes.annotate(gain, (at, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    labels = [f"{each['groups']}\n{each['shuffle']['macs'] / 1e6:.1f} M MACs" for each in data["groups"]]
    axes.set_xticks(range(len(labels)), labels)
    axes.set(xlabel=f"groups, ShuffleNetV1 {data['width']}x", ylabel="accuracy (%)", xlim=(-0.5, len(labels) - 0.5))
    axes.legend()
    training.footnote(figure, data, "whiskers: standard deviation, numbers: mean gain ± its standard error over")
    return figure


def _gain(shuffled: dict[str, Any], plain: dict[str, Any]) -> str:
    """Mean gain of the shuffle in points, and its standard error; empty if a run of either net is missing."""
    gains = [100 * gain for gain in training.gains(shuffled, plain)]
    if len(shuffled["seeds"]) != len(gains):
        return ""
    error = f" ± {statistics.stdev(gains) / math.sqrt(len(gains)):.1f}" if len(gains) > 1 else ""
    return f"{round(statistics.fmean(gains), 1) + 0.0:+.1f}{error}"  # + 0.0: no -0.0


def _finished(net: dict[str, Any] | None) -> bool:
    return bool(net and net["accuracy"])
