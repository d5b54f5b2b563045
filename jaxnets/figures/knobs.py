"""The difference that single fields make: how `recipe_knobs` and `recipe_parts` measure and draw it."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from jaxnets import compare_entries, plots
from jaxnets.errors import UserError
from jaxnets.figures import training
from jaxnets.figures.options import Options

BASE = "base"


def gains(made: Sequence[compare_entries.Entry], options: Options) -> dict[str, Any]:
    """What `measure` returns for entries, the base first; UserError if no run of the base was finished."""
    comparison = training.run(made, options)
    base, *others = comparison["nets"]
    base_data = training.net_data(base)
    if not base_data["curves"]:
        raise UserError(f"no run of the {BASE} was finished in {options.out}, so there is nothing to compare with")
    knobs = [
        {
            "label": net["label"],
            "gains": training.gains(training.net_data(net), base_data),
            "train_seconds": net["results"].get("train_seconds"),
        }
        for net in others
    ]
    return {
        "net": base["model"],
        "base": {
            "accuracy": base_data["accuracy"],
            "train_seconds": base["results"].get("train_seconds"),
        },
        "knobs": knobs,
        "seeds": len(base_data["curves"]),
    } | training.outcome(comparison)


def variants(
    net: str, setting: Sequence[str], knobs: dict[str, Sequence[str]], options: Options
) -> list[compare_entries.Entry]:
    """`net` in a setting, plain and with each knob's fields, which override those of `options`."""
    made = []
    for label, fields in ({BASE: ()} | knobs).items():
        overrides = [*setting, *options.overrides, *(f"--config.{field}" for field in fields)]
        configs = compare_entries.load_configs([options.config], overrides, [net])
        (entry,) = compare_entries.make_entries(configs, [net])
        made.append(dataclasses.replace(entry, label=label))
    return made


def draw(data: dict[str, Any]) -> Figure:
    """A row for each knob: every seed's difference from the base, and their mean."""
    knobs = [knob for knob in data["knobs"] if knob["gains"]]
    knobs.sort(key=lambda knob: statistics.fmean(knob["gains"]))
    figure = plots.new_figure(6.0, 1.2 + 0.26 * len(knobs))
    axes = figure.subplots()
    axes.axvline(0, color=plots.INK, linewidth=0.8)
    for row, knob in enumerate(knobs):
        gains = [100 * gain for gain in knob["gains"]]
        mean = statistics.fmean(gains)
        axes.plot(gains, [row] * len(gains), "o", color=plots.COLOURS[0], markersize=3.5, alpha=0.5)
        axes.plot([mean], [row], "|", color=plots.COLOURS[1], markersize=13, markeredgewidth=2)
        axes.annotate(f"{mean:+.1f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_yticks(range(len(knobs)), [knob["label"] for knob in knobs])
    base = 100 * data["base"]["accuracy"]["mean"]
    axes.set_title(data["net"])
    axes.set_xlabel(f"accuracy, points from {base:.1f} %")
    training.footnote(figure, data, "dots: seeds, bars: mean of")
    return figure
