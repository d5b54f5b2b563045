"""What finished runs reached and cost: numbers from their workdirs, and the tables made from them."""

import csv
import io
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from jaxnets import compare_train_accuracy, journal, machine, optim, report_parts, settings, timing
from jaxnets.compare_entries import TORCH
from jaxnets.errors import UserError
from jaxnets.tables import Section

TARGETS = (0.90, 0.92, 0.93, 0.94)  # accuracies for which the time taken is reported

# Fields that may change when a run is resumed, but not if it belongs to a comparison.
SAME = ("num_epochs", "eval_every_epochs")
# Fields with no effect on what is compared, and those that say which net it is.
NO_RECIPE = settings.FREE_FIELDS.difference(SAME) | {"model.name", "model.num_classes"}

ACCURACIES = ("accuracy", "final_train_accuracy", "train_accuracy")

Record = dict[str, Any]


def read_run(workdir: Path, config: ml_collections.ConfigDict) -> Record | None:
    """The numbers of the run in a workdir, or None if it has not reached `config.num_epochs`.

    `accuracy` is the last epoch's, of the averaged weights if the run keeps them, never the best of all epochs.
    `final_train_accuracy` is that of the same weights on the training images as they are, None if it was not measured;
    `train_accuracy` is the last epoch's as measured in training: on augmented images, while the weights change.
    Seconds count training steps only, without compilation, evaluation and saving, so that an interrupted run has
    the same. `machines`: where it was trained, as returned by `machine.read`.

    Raises UserError for records that are not those of a run.
    """
    records = journal.read_strictly(workdir)
    try:
        return _numbers_of(workdir, config, records)
    except UserError:  # a file that cannot be read now: the run itself may be fine
        raise
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError):
        raise UserError(
            f"{workdir / journal.FILE} does not have the records of a run of {config.num_epochs} epochs; delete its "
            "folder to train that net again"
        ) from None


def last_evaluation(workdir: Path, config: ml_collections.ConfigDict) -> Record | None:
    """The record of the evaluation after a run's last epoch, or None if it has not come so far."""
    evaluated = _evaluations(journal.read_strictly(workdir), config)
    return evaluated[-1] if evaluated else None


def _evaluations(records: Sequence[Record], config: ml_collections.ConfigDict) -> list[Record]:
    """The evaluations of a run that is finished; none of another."""
    found = [record for record in records if journal.is_evaluation(record)]
    return found if found and found[-1]["epoch"] == config.num_epochs else []


def _numbers_of(workdir: Path, config: ml_collections.ConfigDict, records: Sequence[Record]) -> Record | None:
    evaluated = _evaluations(records, config)
    if not evaluated:
        return None
    accuracy = "ema_eval_accuracy" if config.ema_decay else "eval_accuracy"
    trained = [record for record in records if not journal.is_evaluation(record)]
    by_epoch = sorted(_seconds_by_epoch(trained, timing.read(workdir), config).items())
    until = dict(zip((epoch for epoch, _ in by_epoch), itertools.accumulate(seconds for _, seconds in by_epoch)))
    curve = [
        {
            "epoch": record["epoch"],
            "seconds": until[record["epoch"]],
            "accuracy": float(record[accuracy]),
        }
        for record in evaluated
    ]
    return {
        "seed": config.seed,
        "accuracy": curve[-1]["accuracy"],
        "final_train_accuracy": compare_train_accuracy.read(workdir, evaluated[-1]),
        "train_accuracy": journal.epoch_means(trained)[config.num_epochs]["accuracy"],
        "epoch_seconds": curve[-1]["seconds"] / config.num_epochs,
        "train_seconds": curve[-1]["seconds"],
        "train_images": evaluated[-1]["step"] * config.batch_size,
        "seconds_to": {f"{target:.2f}": _seconds_to(curve, target) for target in TARGETS},
        "num_examples": evaluated[-1]["num_examples"],
        "curve": curve,
        "machines": machine.read(workdir),
    }


def _seconds_by_epoch(
    trained: Sequence[Record], spans: Sequence[timing.Span], config: ml_collections.ConfigDict
) -> dict[int, float]:
    """Seconds of each epoch's steps: by the clock or, if its records in the workdir are incomplete, by the rates.

    A rate is applied to all steps since the previous record, though after an interruption it covers only the last ones.
    """
    steps, found = trained[-1]["step"], {}
    ends = [0, *(span.last for span in spans)]
    if ends[-1] == steps and all(span.first == end for span, end in zip(spans, ends)):
        per_epoch = steps // config.num_epochs
        for span in spans:
            epoch = -(-span.last // per_epoch)
            found[epoch] = found.get(epoch, 0.0) + span.training
        return found
    for record, count in journal.with_steps(trained):
        # The rate is rounded to a tenth.
        seconds = count * config.batch_size / max(record["images_per_second"], 0.05)
        found[record["epoch"]] = found.get(record["epoch"], 0.0) + seconds
    return found


def _seconds_to(curve: Sequence[Record], target: float) -> float | None:
    """Training seconds at the first evaluation that reached the target."""
    return next((point["seconds"] for point in curve if point["accuracy"] >= target), None)


def spread(values: Sequence[float]) -> Record:
    """Mean, sample standard deviation (None for a single value), extremes and count."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def over_seeds(runs: Sequence[Record], lost: bool = False) -> Record:
    """The numbers of one net over its finished runs; an accuracy that not all of them reached has no seconds.

    `lost`: some seeds did not finish, so they did not reach it either.
    """
    if not runs:
        return {}
    known = {name: [run[name] for run in runs if run.get(name) is not None] for name in ACCURACIES}
    return {name: spread(values) if values else None for name, values in known.items()} | {
        "epoch_seconds": statistics.median(run["epoch_seconds"] for run in runs),
        "train_seconds": statistics.fmean(run["train_seconds"] for run in runs),
        "seconds_to": {
            target: statistics.fmean(seconds) if None not in seconds and not lost else None
            for target in runs[0]["seconds_to"]
            for seconds in [[run["seconds_to"][target] for run in runs]]
        },
    }


def has_train_accuracy(nets: Sequence[Record]) -> bool:
    """Whether the final weights of any run were evaluated on its training images."""
    return any(run["final_train_accuracy"] is not None for net in nets for run in net["runs"])


def reached(nets: Sequence[Record]) -> list[str]:
    """The targets that at least one run reached."""
    runs = [run for net in nets for run in net["runs"]]
    targets = (f"{target:.2f}" for target in TARGETS)
    return [target for target in targets if any(run["seconds_to"][target] is not None for run in runs)]


def machines(nets: Sequence[Record]) -> dict[str, str]:
    """Where the nets were trained: each machine's sentence, in order of date, mapped to the same with its first day."""
    found = [where for net in nets for run in net["runs"] for where in run["machines"]]
    found.sort(key=lambda where: where["date"])
    first: dict[str, str] = {}
    for where in found:
        first.setdefault(machine.sentence(where), machine.dated_sentence(where))
    return first


def torch_versions(nets: Sequence[Record]) -> str | None:
    """The PyTorch versions that trained the runs, as they recorded them; None if there is no PyTorch net."""
    of_torch = [net for net in nets if net["framework"] == TORCH]
    if not of_torch:
        return None
    found = {where["versions"].get("torch") for net in of_torch for run in net["runs"] for where in run["machines"]}
    return ", ".join(sorted(found - {None}))


def table(comparison: Record) -> Section:
    """One row per net."""
    nets = comparison["nets"]
    targets = reached(nets)
    sized = [net["latency"] for net in nets if net["latency"]]
    columns = {"accuracy": "accuracy (%)", "final_train_accuracy": "train (%)", "train_accuracy": "in training (%)"}
    if not has_train_accuracy(nets):
        del columns["final_train_accuracy"]
    header = ["net", "parameters", "MACs (M)", "epochs", *columns.values()]
    header += [*(f"s to {float(target):.0%}" for target in targets), "s per epoch"]
    rows = []
    for net in nets:
        results = net["results"]
        row = [net["label"], f"{net['parameters']:,}", f"{net['macs'] / 1e6:,.1f}", str(net["config"]["num_epochs"])]
        if results:
            row += [_accuracy_cell(results, name, comparison["seeds"]) for name in columns]
            row += [_seconds(results["seconds_to"][target]) for target in targets]
            row.append(_seconds(results["epoch_seconds"]))
        else:
            row += ["-"] * (len(columns) + len(targets) + 1)
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


def _accuracy_cell(results: Record, name: str, seeds: int) -> str:
    """One of `ACCURACIES`; the number of runs is given with the first only, and with another if that has fewer."""
    value = results.get(name)
    told = name != "accuracy" and value and value["n"] == results["accuracy"]["n"]
    return with_spread(value, 1 if told else seeds)


def with_spread(value: Record | None, seeds: int) -> str:
    """Per cent, with the standard deviation over seeds and, if there are several `seeds`, the number of runs."""
    if value is None:
        return "-"
    spread = "" if value["std"] is None else f" ± {value['std'] * 100:.2f}"
    return f"{value['mean'] * 100:.2f}{spread}" + (f" (n={value['n']})" if seeds > 1 else "")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def csv_text(comparison: Record) -> str:
    """One line per net, numbers unrounded; a missing number is left empty."""
    rows = [_flat(net) for net in comparison["nets"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _flat(net: Record) -> Record:
    results, latency = net["results"], net["latency"] or {}
    row = {name: net[name] for name in ("label", "framework", "model", "image_size", "parameters", "macs")}
    row["epochs"] = net["config"]["num_epochs"]
    for name in ACCURACIES:
        value = results.get(name) or {}
        row |= {f"{name}_{part}": value.get(part) for part in ("mean", "std", "min", "max", "n")}
    row |= {name: results.get(name) for name in ("epoch_seconds", "train_seconds")}
    row |= {f"seconds_to_{target:.2f}": results.get("seconds_to", {}).get(f"{target:.2f}") for target in TARGETS}
    row |= {f"latency_{name}": latency.get(name) for name in ("model", "image_size", "parameters", "macs")}
    row |= {"latency_one_ms": latency.get("one", {}).get("ms"), "latency_batch_size": latency.get("batch_size")}
    return row | {"latency_batch_ms": latency.get("batch", {}).get("ms"), "failed": "; ".join(net["failed"])}


def notes(comparison: Record) -> list[str]:
    """How the numbers were obtained, one sentence each."""
    seeds, nets = comparison["seeds"], comparison["nets"]
    augmented = any(any(net["config"]["augment"].values()) or net["config"].get("crop_area") for net in nets)
    found = [
        f"Accuracy: {comparison['eval_split']} of {comparison['dataset']}, after the last epoch"
        + (f", mean ± sample standard deviation over {seeds} seeds." if seeds > 1 else ", one seed."),
        *_averaged(nets),
        *_trained_alike(comparison),
    ]
    if has_train_accuracy(nets):
        found.append("Train: of the same weights as the accuracy, on the training images as they are.")
    found += [
        "In training: mean over the last epoch, while the weights were changing"
        + (", on augmented images." if augmented else "."),
        "Seconds: of the training steps, without compilation, evaluation and saving; per epoch: each run's mean, and "
        "the median over the seeds.",
    ]
    if fields := [name for name, _ in recipe_differences(nets)]:
        found.append(f"The nets were not trained alike: they differ in {', '.join(fields)}.")
    if comparison["torch"] is not None:
        found.append(
            f"PyTorch {comparison['torch'] or 'as installed'}, eager: the same initial weights, order of images "
            "and recipe, in the faster of channels_last and NCHW; crops, mirroring, cutout and dropout are drawn "
            "independently."
        )
    if reached(nets):
        found.append(
            "Seconds to an accuracy: up to the first evaluation that reached it, mean over the seeds; none where a "
            "seed did not reach it."
        )
    else:
        found.append(f"No run reached {min(TARGETS):.0%}.")
    if latencies := [net["latency"] for net in nets if net["latency"]]:
        twins = any(net["latency"] and net["latency"]["model"] != net["model"] for net in nets)
        where = dict.fromkeys(machine.sentence(latency["machine"]) for latency in latencies)
        both = comparison["torch"] is not None
        alone = ", of jaxnets alone (`python -m jaxnets.benchmark` races both)" if both else ""
        found.append(
            "Latency: forward pass of evaluation, median"
            + (", of the ImageNet net of the same name (its parameters and MACs: compare.csv)" if twins else "")
            + alone
            + f"; on {'; '.join(where)}."
        )
    if where := machines(nets):
        numbers = [f"{number}: " if len(where) > 1 else "" for number in range(1, len(where) + 1)]
        found.append(f"Trained on: {'; '.join(map(''.join, zip(numbers, where.values())))}.")
    found += [f"Failed: {sentence}." for sentence in failures(nets)]
    if comparison["note"]:
        found.append(comparison["note"])
    return found


def _trained_alike(comparison: Record) -> list[str]:
    """The most important settings that all nets were trained with alike, in one sentence."""
    configs = [settings.flatten(net["config"]) for net in comparison["nets"]]
    first, *others = configs

    def shared(*names: str) -> bool:
        return all(name in first and all(config.get(name) == first[name] for config in others) for name in names)

    said = [f"{comparison['train_split']} of {comparison['dataset']}"]
    if shared("image_size"):
        grow = any(config.get("progressive_sizes") for config in configs)
        said.append(f"{'up to ' if grow else ''}{first['image_size']} pixels")
    if shared("num_epochs"):
        said.append(f"{first['num_epochs']} epochs")
    if shared("batch_size"):
        said.append(f"batches of {first['batch_size']}")
    if shared("batch_size", "optimizer.name", "optimizer.learning_rate", "optimizer.batch_scaling"):
        scaling = first["optimizer.learning_rate"], first["batch_size"], first["optimizer.batch_scaling"]
        said.append(f"{first['optimizer.name']} at {optim.scale_rate(*scaling):g}")
    return [f"Training: {', '.join(said)}; all fields: compare.json."]


def recipe_differences(nets: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """The configuration fields in which the nets' training differs, and their values net by net.

    Fields without effect, those that say which net it is, and those that the labels give are left out.
    """
    found = report_parts.differences([net["config"] for net in nets])
    said = [_said(net["label"]) for net in nets]

    def left_to_say(name: str, values: Sequence[str]) -> bool:
        return len({value for value, fields in zip(values, said) if name not in fields}) > 1

    return [(name, values) for name, values in found if name not in NO_RECIPE and left_to_say(name, values)]


def _said(label: str) -> set[str]:
    """The fields that a net's label gives: model.width for `mobilenet_v2_cifar:width=0.5`."""
    return {f"model.{assignment.partition('=')[0]}" for assignment in label.split(":")[1:]}


def _averaged(nets: Sequence[Record]) -> list[str]:
    """Which nets' accuracy is that of their averaged weights, in a sentence; none if there are no such nets."""
    labels = [net["label"] for net in nets if net["config"].get("ema_decay")]
    if not labels:
        return []
    whose = "" if len(labels) == len(nets) else f" of {', '.join(labels)}"
    return [f"Accuracy{whose}: with the weights' moving average (config.ema_decay)."]


def failures(nets: Sequence[Record]) -> list[str]:
    """What went wrong, one sentence per failure."""
    return [f"{net['label']}, {sentence}" for net in nets for sentence in net["failed"]]


def require_finished(failed: Sequence[str]) -> None:
    """UserError with the first of `failures`, if any, and how many more there are."""
    if failed:
        more = f"; and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise UserError(f"failed: {failed[0]}{more}")
