"""What finished runs reached and cost: numbers from their workdirs, and the tables made of them."""

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from jaxnets import journal
from jaxnets.summary import Section

TARGETS = (0.90, 0.92, 0.93, 0.94)  # accuracies whose time is told

Record = dict[str, Any]


def read_run(workdir: Path, config: ml_collections.ConfigDict) -> Record | None:
    """The numbers of the run in a workdir, or None if it has not reached `config.num_epochs`.

    `accuracy` is the last epoch's, of the averaged weights where the run keeps some, never the best of all epochs.
    Seconds are those of the training steps: compilation, evaluation and saving are left out, so that a run that
    was interrupted has the same. `train_accuracy` is the last epoch's as training saw it, on augmented images.
    """
    records = journal.read(workdir)
    evaluated = [record for record in records if "eval_accuracy" in record]
    if not evaluated or evaluated[-1]["epoch"] != config.num_epochs:
        return None
    accuracy = "ema_eval_accuracy" if config.ema_decay else "eval_accuracy"
    trained = _with_seconds([record for record in records if "images_per_second" in record], config.batch_size)
    last = [record for record in trained if record["epoch"] == config.num_epochs]
    by_epoch: dict[int, float] = {}
    for record in trained:
        by_epoch[record["epoch"]] = by_epoch.get(record["epoch"], 0.0) + record["seconds"]
    curve = [
        {
            "epoch": record["epoch"],
            "seconds": sum(seconds for epoch, seconds in by_epoch.items() if epoch <= record["epoch"]),
            "accuracy": record[accuracy],
        }
        for record in evaluated
    ]
    return {
        "seed": config.seed,
        "accuracy": curve[-1]["accuracy"],
        "train_accuracy": sum(r["accuracy"] * r["steps"] for r in last) / sum(r["steps"] for r in last),
        "epoch_seconds": curve[-1]["seconds"] / config.num_epochs,
        "train_seconds": curve[-1]["seconds"],
        "train_images": evaluated[-1]["step"] * config.batch_size,
        "seconds_to": {f"{target:.2f}": _seconds_to(curve, target) for target in TARGETS},
        "num_examples": evaluated[-1]["num_examples"],
        "curve": curve,
    }


def _with_seconds(trained: Sequence[Record], batch_size: int) -> list[Record]:
    """The train records with the steps and seconds since the one before."""
    before, found = 0, []
    for record in trained:
        steps = record["step"] - before
        # The rate is rounded to a tenth.
        seconds = steps * batch_size / max(record["images_per_second"], 0.05)
        found.append(record | {"steps": steps, "seconds": seconds})
        before = record["step"]
    return found


def _seconds_to(curve: Sequence[Record], target: float) -> float | None:
    """Training seconds at the first evaluation that reached the target."""
    return next((point["seconds"] for point in curve if point["accuracy"] >= target), None)


def spread(values: Sequence[float]) -> Record:
    """Mean, sample standard deviation (None of a single value), extremes and count."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def over_seeds(runs: Sequence[Record]) -> Record:
    """The numbers of one net over its finished runs; an accuracy not reached by all of them has no seconds."""
    if not runs:
        return {}
    return {name: spread([run[name] for run in runs]) for name in ("accuracy", "train_accuracy")} | {
        "epoch_seconds": statistics.median(run["epoch_seconds"] for run in runs),
        "train_seconds": statistics.fmean(run["train_seconds"] for run in runs),
        "seconds_to": {
            target: statistics.fmean(seconds) if None not in seconds else None
            for target in runs[0]["seconds_to"]
            for seconds in [[run["seconds_to"][target] for run in runs]]
        },
    }


def reached(nets: Sequence[Record]) -> list[str]:
    """The targets that some net reached with every seed."""
    targets = (f"{target:.2f}" for target in TARGETS)
    return [t for t in targets if any(net["results"].get("seconds_to", {}).get(t) is not None for net in nets)]


def table(comparison: Record) -> Section:
    """One row a net."""
    nets = comparison["nets"]
    targets = reached(nets)
    sized = [net["latency"] for net in nets if net["latency"]]
    header = ["net", "parameters", "MACs (M)", "accuracy (%)", "train (%)", *(f"s to {float(t):.0%}" for t in targets)]
    header.append("s an epoch")
    rows = []
    for net in nets:
        results = net["results"]
        row = [net["label"], f"{net['parameters']:,}", f"{net['macs'] / 1e6:,.1f}"]
        if results:
            row += [with_spread(results["accuracy"]), with_spread(results["train_accuracy"])]
            row += [_seconds(results["seconds_to"][target]) for target in targets]
            row.append(_seconds(results["epoch_seconds"]))
        else:
            row += ["-"] * (3 + len(targets))
        rows.append(row)
    if sized:
        batch = sized[0]["batch_size"]
        header += ["image (px)", "1 image (ms)", f"{batch} images (ms)"]
        for net, row in zip(nets, rows):
            row += _latency_cells(net["latency"])
    return Section("", tuple(header), [tuple(row) for row in rows], text_columns=1, footer="")


def _latency_cells(latency: Record | None) -> list[str]:
    if not latency:
        return ["-"] * 3
    return [str(latency["image_size"]), _milliseconds(latency["one"]["ms"]), _milliseconds(latency["batch"]["ms"])]


def with_spread(value: Record) -> str:
    """Per cent, with the standard deviation over seeds and how many they are."""
    if value["std"] is None:
        return f"{value['mean'] * 100:.2f}"
    return f"{value['mean'] * 100:.2f} ± {value['std'] * 100:.2f} (n={value['n']})"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def csv_text(comparison: Record) -> str:
    """One line a net, numbers unrounded; empty where there is none."""
    rows = [_flat(net) for net in comparison["nets"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _flat(net: Record) -> Record:
    results, latency = net["results"], net["latency"] or {}
    row = {name: net[name] for name in ("label", "model", "image_size", "parameters", "macs")}
    for name in ("accuracy", "train_accuracy"):
        value = results.get(name, {})
        row |= {f"{name}_{part}": value.get(part) for part in ("mean", "std", "min", "max", "n")}
    row |= {name: results.get(name) for name in ("epoch_seconds", "train_seconds")}
    row |= {f"seconds_to_{target:.2f}": results.get("seconds_to", {}).get(f"{target:.2f}") for target in TARGETS}
    row |= {f"latency_{name}": latency.get(name) for name in ("model", "image_size", "parameters", "macs")}
    row |= {"latency_one_ms": latency.get("one", {}).get("ms"), "latency_batch_size": latency.get("batch_size")}
    return row | {"latency_batch_ms": latency.get("batch", {}).get("ms"), "failed": "; ".join(net["failed"])}


def notes(comparison: Record) -> list[str]:
    """How the numbers were made, a sentence each."""
    seeds = comparison["seeds"]
    found = [
        f"Accuracy: {comparison['eval_split']} of {comparison['dataset']}, after the last epoch"
        + (f", mean ± sample standard deviation over {seeds} seeds." if seeds > 1 else ", one seed."),
        "Train accuracy: of the last epoch, as training saw it: on augmented images, while the weights moved.",
        "Seconds: of the training steps; compilation, evaluation and saving are left out.",
    ]
    if comparison["torch"]:
        found.append(
            f"PyTorch {comparison['torch']}: the same first weights, order of images and recipe, in the faster of "
            "channels_last and NCHW; crops, mirroring, cutout and dropout drawn anew."
        )
    if not reached(comparison["nets"]):
        found.append(f"No net reached {min(TARGETS):.0%}.")
    latencies = [net["latency"] for net in comparison["nets"] if net["latency"]]
    if latencies:
        twins = any(net["latency"] and net["latency"]["model"] != net["model"] for net in comparison["nets"])
        found.append(
            "Latency: forward pass of evaluation, median"
            + (", of the ImageNet net of the same name (its parameters and MACs: compare.csv)." if twins else ".")
        )
    if comparison["note"]:
        found.append(comparison["note"])
    return found
