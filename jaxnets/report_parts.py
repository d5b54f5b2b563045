"""The parts of a run's page as its template takes them: headline, curves, mistakes, time, fields. All text is plain."""

import base64
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxnets import charts, settings, timing
from jaxnets.predictions import Evaluated

MAX_TABLE = 20  # classes whose confusions are a table; those of more are an image
MAX_MATRIX = 1000  # and of more than that are not drawn: an image has a dot for every two classes
NUM_PAIRS = 10
SERIES = tuple(name for name in charts.COLOURS if name.startswith("series-"))
TRAINING, EVALUATION, AVERAGED = SERIES[1], SERIES[0], SERIES[2]  # of a page with one run

Record = dict[str, Any]


@dataclass(frozen=True)
class History:
    """What the workdir of a run holds about its course."""

    directory: Path
    name: str
    config: dict[str, Any]
    trained: list[Record]  # the train records of metrics.jsonl
    evaluations: list[Record]  # and the eval records
    spans: list[timing.Span]
    machines: list[Record]  # where it was trained, as `machine.read` gives it
    evaluated: Evaluated | None  # the last evaluation, example by example

    @property
    def epochs(self) -> list[Record]:
        """The training throughput of every span, as records; over whole epochs, which no report's timing spoils."""
        size = self.config.get("batch_size", 0)
        took = [(span, sum(span.seconds.get(name, 0.0) for name in timing.TRAINING)) for span in self.spans]
        return [
            {"step": span.last, "images_per_second": (span.last - span.first) * size / seconds}
            for span, seconds in took
            if span.last > span.first and seconds > 0
        ]

    def steps(self, records: Sequence[Record]) -> np.ndarray:
        return np.array([record["step"] for record in records], float)

    def seconds(self, records: Sequence[Record]) -> np.ndarray:
        return timing.elapsed(self.spans, self.steps(records))


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.42 s, 3 min 5 s, 2 h 5 min."""
    if not np.isfinite(seconds):
        return "–"
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    unit, smaller, size = ("min", "s", 60) if seconds < 3599.5 else ("h", "min", 3600)
    whole, rest = divmod(round(seconds * 60 / size), 60)
    return f"{whole} {unit} {rest} {smaller}"


def lede(run: History) -> str:
    """The run in a line: net, data, length."""
    config = run.config
    width = (config.get("model") or {}).get("width")
    net = str((config.get("model") or {}).get("name")) + (f", width {width}" if width else "")
    epochs, records = config.get("num_epochs"), run.trained + run.evaluations
    last, at = (max(record[name] for record in records) for name in ("step", "epoch"))
    # Only its evaluation ends a run.
    done = bool(run.evaluations) and run.evaluations[-1]["epoch"] == epochs
    state = f"{epochs} epochs" if done else f"epoch {at} of {epochs} so far"
    return f"{net}, on {config.get('dataset')}; {state}, {last:,} steps of {config.get('batch_size')} images"


def tiles(run: History) -> list[dict[str, str]]:
    """The numbers that come first, each with a label and a remark."""

    def tile(label, value, note=""):
        return {"label": label, "value": value, "note": note}

    made = []
    if run.evaluations:
        best = max(run.evaluations, key=lambda record: record["eval_accuracy"])
        last = run.evaluations[-1]
        images = last.get("num_examples")
        made += [
            tile("best accuracy", f"{best['eval_accuracy']:.2%}", f"evaluation after epoch {best['epoch']}"),
            tile(
                "last accuracy",
                f"{last['eval_accuracy']:.2%}",
                f"of {images:,} images" if isinstance(images, int) else "",
            ),
            tile("last loss", f"{last['eval_loss']:.4f}", "evaluation, nats"),
        ]
        if "ema_eval_accuracy" in last:
            made.append(tile("averaged weights", f"{last['ema_eval_accuracy']:.2%}", "last accuracy"))
    if speeds := [record["images_per_second"] for record in run.epochs]:
        made.append(tile("throughput", f"{np.median(speeds):,.0f}", "training images a second, median"))
    if run.spans:
        made.append(tile("time", duration(sum(timing.totals(run.spans).values())), "all included"))
    return made


def legend(runs: Sequence[History]) -> list[dict[str, Any]]:
    """What each kind of line is."""
    if len(runs) > 1:
        names = [
            {"label": run.name, "colour": colour, "faint": False, "dashed": dashed}
            for run, (colour, dashed) in zip(runs, run_styles(len(runs)))
        ]
        return [*names, {"label": "thin: training", "colour": "muted", "faint": True, "dashed": False}]
    made = [
        {"label": "evaluation", "colour": EVALUATION, "faint": False, "dashed": False},
        {"label": "training", "colour": TRAINING, "faint": True, "dashed": False},
    ]
    if any("ema_eval_loss" in record for record in runs[0].evaluations):
        made.insert(1, {"label": "evaluation, averaged weights", "colour": AVERAGED, "faint": False, "dashed": True})
    return made


def run_styles(count: int) -> list[tuple[str, bool]]:
    """The colour of each of several runs, and whether its lines are dashed: those beyond the colours are."""
    return [(SERIES[number % len(SERIES)], number // len(SERIES) % 2 == 1) for number in range(count)]


def draw_charts(runs: Sequence[History]) -> list[dict[str, str]]:
    """Loss, accuracy, learning rate and throughput, over steps and, where it is known, over time."""
    axes = [("step", 1.0, "step")]
    longest = max((sum(timing.totals(run.spans).values()) for run in runs if run.spans), default=0.0)
    if longest:
        unit, name = next((u, n) for u, n, limit in TIME_UNITS if longest < limit)
        axes.append(("time", unit, name))
    drawn = (_draw_chart(runs, axis, unit, label, *chart) for axis, unit, label in axes for chart in CHARTS)
    return [chart for chart in drawn if chart]


TIME_UNITS = ((1.0, "seconds", 180), (60.0, "minutes", 3 * 3600), (3600.0, "hours", np.inf))
# Title, field of the train records, field of the eval records, and how its axis is made
CHARTS = (
    ("Loss", "loss", "eval_loss", {}),
    ("Accuracy", "accuracy", "eval_accuracy", {"percent": True}),
    ("Learning rate", "learning_rate", None, {"from_zero": True}),
    ("Images a second, training", "images_per_second", None, {"from_zero": True}),
)


def _draw_chart(runs, axis: str, unit: float, xlabel: str, title: str, trained: str, evaluated: str | None, look):
    """One chart with its title and description, or None where there is nothing to draw."""
    curves, descriptions = [], []

    def add(run, records, field, label, **style):
        records = [record for record in records if isinstance(record.get(field), int | float)]
        if not records:
            return
        x = run.steps(records) if axis == "step" else run.seconds(records) / unit
        y = np.array([record[field] for record in records], float)
        curves.append(charts.Curve(x, y, **style))
        descriptions.append(f"{label} from {y[0]:.4g} to {y[-1]:.4g}")

    for run, (colour, dashed) in zip(runs, run_styles(len(runs))):
        several = len(runs) > 1
        name = f"{run.name}, " if several else ""
        style = {"colour": colour if several else TRAINING, "dashed": dashed}
        records = run.epochs if trained == "images_per_second" else run.trained
        marked = trained == "images_per_second"
        add(run, records, trained, f"{name}training", faint=bool(evaluated), marked=marked, **style)
        if evaluated:
            style["colour"] = colour if several else EVALUATION
            add(run, run.evaluations, evaluated, f"{name}evaluation", marked=True, **style)
            if not several:
                style = {"colour": AVERAGED, "dashed": True, "marked": True}
                add(run, run.evaluations, f"ema_{evaluated}", "averaged weights", **style)
    if not curves:
        return None
    return {
        "axis": axis,
        "title": title,
        "svg": charts.draw_curves(f"{trained.replace('_', '-')}-{axis}", curves, xlabel=xlabel, **look),
        "description": f"{title} over {xlabel}: {'; '.join(descriptions)}",
    }


def evaluations(run: History) -> dict[str, list]:
    """A row for each evaluation, with the last training report before it."""
    seconds = run.seconds(run.evaluations)
    columns = ["epoch", "step", "time", "learning rate", "training loss", "accuracy", "evaluation loss", "accuracy"]
    averaged = any("ema_eval_accuracy" in record for record in run.evaluations)
    rows = []
    for record, when in zip(run.evaluations, seconds):
        before = [trained for trained in run.trained if trained["step"] <= record["step"]]
        trained = before[-1] if before else {}
        row = [
            record["epoch"],
            f"{record['step']:,}",
            duration(when),
            _shown(trained.get("learning_rate"), ".3g"),
            _shown(trained.get("loss"), ".4f"),
            _shown(trained.get("accuracy"), ".2%"),
            f"{record['eval_loss']:.4f}",
            f"{record['eval_accuracy']:.2%}",
        ]
        rows.append(row + [_shown(record.get("ema_eval_accuracy"), ".2%")] * averaged)
    return {"columns": columns + ["averaged accuracy"] * averaged, "rows": rows}


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def time(run: History) -> list[dict[str, Any]]:
    """The phases, the longest first, with their share of the whole."""
    totals = {name: seconds for name, seconds in timing.totals(run.spans).items() if seconds > 0}
    whole = sum(totals.values())
    return [
        {
            "name": name,
            "duration": duration(seconds),
            "share": f"{seconds / whole:.1%}",
            "weight": f"{seconds / whole:.5f}",
            "colour": number % len(SERIES) + 1,
        }
        for number, (name, seconds) in enumerate(totals.items())
    ]


def fields(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The configuration by dotted names; what a net was left to decide is left out."""
    flat = settings.flatten(config)
    return [(name, _value(value)) for name, value in flat.items() if value is not None]


def differences(configs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The fields, by dotted name, that are not the same in all of some runs."""
    flat = [settings.flatten(config) for config in configs]
    names = dict.fromkeys(name for config in flat for name in config)
    rows = [(name, [_value(config.get(name)) for config in flat]) for name in names if name != "data_dir"]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def errors(run: History) -> dict[str, Any] | None:
    """Confusions, accuracy by class and the worst mistakes of the last evaluation kept."""
    evaluated = run.evaluated
    if evaluated is None or not len(evaluated.label):
        return None
    names = class_names(evaluated)
    confusions = Confusions.of(evaluated, len(names))
    made = {
        "note": f"The last evaluation, of {len(evaluated.label):,} images, after step {int(evaluated.step):,}.",
        "class_names": names,
        "matrix": None,
        "image": None,
        "pairs": _pairs(confusions, names),
        "classes": _classes(evaluated, confusions, names),
        "shown": MAX_TABLE,
        "mistakes": _mistakes(evaluated, names),
        "num_mistakes": f"{int((evaluated.label != evaluated.predicted).sum()):,}",
        "num_examples": f"{len(evaluated.label):,}",
    }
    if len(names) <= MAX_TABLE:
        made["matrix"] = [
            [_cell(share, at == row) for at, share in enumerate(shares_of_row)]
            for row, shares_of_row in enumerate(confusions.shares())
        ]
    elif len(names) <= MAX_MATRIX:
        identity = f"confusion-{run.name}".encode().hex()  # unlike any other's on the page
        shares = confusions.shares()
        made["image"] = charts.draw_matrix(identity, shares, xlabel="taken for class", ylabel="is class")
    return made


@dataclass(frozen=True)
class Confusions:
    """The entries of a confusion matrix that are not 0, row by row: of thousands of classes the whole is too large."""

    num_classes: int
    label: np.ndarray  # (P,) int64
    predicted: np.ndarray  # (P,) int64
    images: np.ndarray  # (P,) int64, how many
    support: np.ndarray  # (C,) int64, the images of each class

    @classmethod
    def of(cls, evaluated: Evaluated, num_classes: int) -> "Confusions":
        pairs = evaluated.label.astype(np.int64) * num_classes + evaluated.predicted
        pairs, images = np.unique(pairs, return_counts=True)
        support = np.bincount(evaluated.label, minlength=num_classes)
        return cls(num_classes, *np.divmod(pairs, num_classes), images, support)

    def shares(self) -> np.ndarray:
        """The whole matrix, each row over its sum, 0 where that is 0."""
        shares = np.zeros((self.num_classes, self.num_classes))
        shares[self.label, self.predicted] = self.images / self.support[self.label]
        return shares

    def wrong(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Label, prediction and number of those off the diagonal, the most frequent first."""
        off = np.flatnonzero(self.label != self.predicted)
        off = off[np.argsort(-self.images[off], kind="stable")]
        return self.label[off], self.predicted[off], self.images[off]


def class_names(evaluated: Evaluated) -> list[str]:
    """A name for every class there is; a net may have more classes than its data set names."""
    count = max(len(evaluated.class_names), int(evaluated.predicted.max(initial=0)) + 1)
    names = evaluated.class_names.tolist()
    return names + [f"class {number}" for number in range(len(names), count)]


def _cell(share: float, right: bool) -> dict[str, str]:
    # The eye compares areas of one colour badly: the square root shows small shares, which are the news here.
    shade = 90 * math.sqrt(share)
    text = f"{100 * share:.0f}" if share >= 0.005 else "·"
    kinds = {"right": right, "strong": shade > 60, "none": share < 0.005}
    return {"text": text, "shade": f"{shade:.0f}", "kind": " ".join(name for name, holds in kinds.items() if holds)}


def _pairs(confusions: Confusions, names: Sequence[str]) -> list[dict[str, str]]:
    return [
        {
            "label": names[label],
            "predicted": names[predicted],
            "count": f"{count:,}",
            "share": f"{count / confusions.support[label]:.1%}",
        }
        for label, predicted, count in itertools.islice(zip(*confusions.wrong()), NUM_PAIRS)
    ]


def _classes(evaluated: Evaluated, confusions: Confusions, names: Sequence[str]) -> list[dict[str, str]]:
    """A row for each class that there are images of, the hardest first."""
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, _, support = precision_recall_fscore_support(
        evaluated.label, evaluated.predicted, labels=range(len(names)), zero_division=np.nan
    )
    taken_for: dict[int, tuple[int, int]] = {}
    for label, predicted, count in zip(*confusions.wrong()):
        taken_for.setdefault(label, (predicted, count))  # the first is the most frequent
    rows = []
    for at in np.argsort(recall, kind="stable"):
        if not support[at]:
            continue
        worst, count = taken_for.get(at, (at, 0))
        rows.append(
            {
                "name": names[at],
                "accuracy": f"{recall[at]:.1%}",
                "width": f"{100 * recall[at]:.1f}",
                "precision": "–" if np.isnan(precision[at]) else f"{precision[at]:.1%}",
                "taken_for": f"{names[worst]} ({count / support[at]:.1%})" if count else "–",
            }
        )
    return rows


def _mistakes(evaluated: Evaluated, names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "source": _png(image),
            "small": image.shape[0] < 96,
            "label": names[evaluated.label[at]],
            "predicted": names[evaluated.predicted[at]],
            "probability": _percent(evaluated.probability[at]),
            "label_probability": _percent(evaluated.label_probability[at]),
        }
        for at, image in zip(evaluated.mistakes, evaluated.images)
    ]


def _percent(probability: float) -> str:
    return f"{probability:.1%}" if probability >= 0.001 else "<0.1%"


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def by_class(runs: Sequence[History]) -> list[dict[str, Any]]:
    """The accuracy of each class in each run; empty where the runs do not share their classes."""
    if any(run.evaluated is None for run in runs):
        return []
    names = runs[0].evaluated.class_names
    if any(not np.array_equal(run.evaluated.class_names, names) for run in runs):
        return []
    right, support = [], []
    for run in runs:
        label, predicted = run.evaluated.label, run.evaluated.predicted
        right.append(np.bincount(label[label == predicted], minlength=len(names)))
        support.append(np.bincount(label, minlength=len(names)))
    support = np.array(support)
    shares = np.array(right) / np.maximum(support, 1)
    return [
        {
            "name": name,
            "cells": [
                {"text": f"{share:.1%}" if images else "–", "width": f"{100 * share:.1f}"}
                for share, images in zip(shares[:, at], support[:, at])
            ],
        }
        for at, name in enumerate(names)
    ]
