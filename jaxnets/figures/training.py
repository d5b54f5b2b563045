"""What figures that train nets share: their settings, and what they cost."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from jaxnets import augment, compare_entries, compare_results, compare_runs, plots, summary
from jaxnets.errors import as_utf8
from jaxnets.figures.options import Options

# As the default recipe uses it.
MUON = (
    *compare_entries.PLAIN,
    "--config.optimizer.name=muon",
    "--config.optimizer.learning_rate=0.02",
    "--config.optimizer.weight_decay=0.05",
)
# Differences of a point between nets show only once they have seen many images: all of them, but small. A few minutes
# per run on a laptop; `--config.FIELD=VALUE` overrides any of it.
MANY_IMAGES = (
    *MUON,
    "--config.image_size=16",
    "--config.augment.crop_padding=2",
    "--config.num_epochs=4",
    "--config.batch_size=256",
)


def train(models: Sequence[str], setting: Sequence[str], options: Options) -> dict[str, Any]:
    """Train nets in a setting, or resume; returns the comparison, `compare_runs.run`'s record."""
    return run(entries(models, setting, options), options)


def entries(models: Sequence[str], setting: Sequence[str], options: Options) -> list[compare_entries.Entry]:
    """The nets to train in a setting, whose fields those of `options` override."""
    configs = compare_entries.load_configs([options.config], [*setting, *options.overrides], models)
    return compare_entries.make_entries(configs, models)


def run(entries: Sequence[compare_entries.Entry], options: Options) -> dict[str, Any]:
    """Train the entries, or resume; returns the comparison."""
    return compare_runs.run(
        entries,
        options.seeds,
        options.out,
        latency_batch=0,
        command=options.command,
        note=options.note,
        further=options.files,
    )


def outcome(comparison: dict[str, Any]) -> dict[str, Any]:
    """What a figure's data say about the runs behind it: what they cost, and which failed."""
    return {"compute": compute(comparison), "failed": compare_results.failures(comparison["nets"])}


def compute(comparison: dict[str, Any]) -> str:
    """What a comparison cost, in one line: runs, images, arithmetic, seconds, machine; and what did not finish."""
    config = comparison["nets"][0]["config"]
    runs = [run for net in comparison["nets"] for run in net["runs"]]
    seconds = sum(run["train_seconds"] for run in runs)
    # A step is a forward pass, and a backward pass of twice its cost.
    macs = sum(3 * _mean_macs(net) * sum(run["train_images"] for run in net["runs"]) for net in comparison["nets"])
    failed = [net["label"] for net in comparison["nets"] if net["failed"]]
    return as_utf8(
        f"{len(runs)} runs of {config['num_epochs']} epochs on {comparison['dataset']} {comparison['train_split']} at "
        f"{config['image_size']} px: {macs / 1e12:.1f} T MACs, {seconds / 60:.1f} min of training; accuracy of "
        + "; ".join([comparison["eval_split"], *compare_results.machines(comparison["nets"]).values()])
        + (f"; not finished: {', '.join(failed)}" if failed else "")
        + (f"; {comparison['note']}" if comparison["note"] else "")
    )


def _mean_macs(net: dict[str, Any]) -> float:
    """Mean multiply-accumulates per image, over the sizes that the epochs train on."""
    config, side = net["config"], net["image_size"]
    epochs = range(config["num_epochs"])
    sizes = [augment.progressive_size(config["progressive_sizes"], side, at, len(epochs)) for at in epochs]
    counted = {size: summary.summarize(net["model"], size, **net["fields"]).macs for size in {*sizes} - {side}}
    macs = counted | {side: net["macs"]}
    return statistics.fmean(macs[size] for size in sizes)


def footnote(figure: Figure, data: dict[str, Any], spread: str) -> None:
    """Add below a figure what it cost, and what shows the spread over seeds."""
    seeds = f"; {spread} {data['seeds']} seeds" if data["seeds"] > 1 else "; one seed"
    plots.footnote(figure, data["compute"] + seeds)


def whiskers(accuracies: Sequence[dict[str, Any]]) -> list[float] | None:
    """Standard deviations in percentage points for `errorbar`; None for a single seed."""
    found = [math.nan if accuracy["std"] is None else 100 * accuracy["std"] for accuracy in accuracies]
    return None if all(map(math.isnan, found)) else found


def net_data(net: dict[str, Any]) -> dict[str, Any]:
    """What is drawn for a net of a comparison."""
    return {
        "label": net["label"],
        "parameters": net["parameters"],
        "macs": net["macs"],
        "accuracy": net["results"]["accuracy"] if net["results"] else None,
        "seeds": [run["seed"] for run in net["runs"]],
        "curves": [[(point["epoch"], point["accuracy"]) for point in run["curve"]] for run in net["runs"]],
    }


def gains(net: dict[str, Any], base: dict[str, Any]) -> list[float]:
    """What a net has over `base`, both of `net_data`, for each seed of `base`: runs of one seed begin alike.

    Empty if a run of the net is missing, because it diverged, say: the mean would be of other runs than the base's.
    """
    ours, theirs = ({seed: curve[-1][1] for seed, curve in zip(each["seeds"], each["curves"])} for each in (net, base))
    return [ours[seed] - theirs[seed] for seed in theirs] if ours.keys() >= theirs.keys() else []
