"""What a run got wrong, as its page's template takes it: confusions, accuracy by class, the worst mistakes."""

import base64
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from jaxnets import charts
from jaxnets.errors import printable
from jaxnets.predictions import Evaluated
from jaxnets.report_parts import History

MAX_TABLE = 20  # classes at most for a confusion matrix as a table; with more it is an image
MAX_MATRIX = 1000  # and with more than that it is not drawn
NUM_PAIRS = 10
NOTHING = np.zeros(0, np.int64)


def mistakes(run: History) -> dict[str, Any] | None:
    """Confusions, accuracy by class and the worst mistakes of the last evaluation kept."""
    evaluated = run.evaluated
    if evaluated is None or not len(evaluated.label):
        return None
    names = class_names(evaluated)
    confusions = Confusions.of(evaluated, len(names))
    whose = " of the averaged weights" if run.config.get("ema_decay") else ""
    made = {
        "note": f"The last evaluation{whose}: {len(evaluated.label):,} images, after step {int(evaluated.step):,}.",
        "class_names": names,
        "matrix": None,
        "image": None,
        "pairs": _pairs(confusions, names),
        "classes": _classes(evaluated, confusions, names),
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
        # Unique on the page, whatever bytes the folder's name has.
        identity = f"confusion-{run.name}".encode(errors="surrogatepass").hex()
        shares = confusions.shares()
        made["image"] = charts.draw_matrix(identity, shares, xlabel="predicted class", ylabel="true class")
        made["classes_a_dot"] = -(-len(names) // charts.MAX_CELLS)
    return made


@dataclass(frozen=True)
class Confusions:
    """The nonzero entries of a confusion matrix, row by row: for thousands of classes the whole is too large."""

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
        """The whole matrix, each row divided by its sum, 0 where that is 0."""
        shares = np.zeros((self.num_classes, self.num_classes))
        shares[self.label, self.predicted] = self.images / self.support[self.label]
        return shares

    def wrong(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Label, prediction and number of images off the diagonal, the most frequent first."""
        off = np.flatnonzero(self.label != self.predicted)
        off = off[np.argsort(-self.images[off], kind="stable")]
        return self.label[off], self.predicted[off], self.images[off]


def class_names(evaluated: Evaluated) -> list[str]:
    """A name for every class; a net may have more classes than its data set names."""
    count = max(len(evaluated.class_names), int(evaluated.predicted.max(initial=0)) + 1)
    names = evaluated.class_names.tolist()
    return names + [f"class {number}" for number in range(len(names), count)]


def _cell(share: float, right: bool) -> dict[str, str]:
    # The eye is poor at comparing shades of a colour: the square root shows small shares, which matter here.
    shade = 90 * math.sqrt(share)
    # Half up; 29 in 200 is 14.499999999999998 % in binary.
    percent = math.floor(round(100 * share, 6) + 0.5)
    # Shades on which a page's usual text is harder to read: on a dark page (strong), on a light one (stronger).
    kinds = {"right": right, "strong": shade > 60, "stronger": right and shade > 82, "none": not percent}
    kind = " ".join(name for name, holds in kinds.items() if holds)
    return {"text": str(percent or "·"), "shade": f"{shade:.0f}", "kind": kind}


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
    """A row for each class that has images, the hardest first."""
    from sklearn.metrics import precision_recall_fscore_support  # in the page's thread, as in charts

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
                "number": int(at),
                "images": f"{support[at]:,}",
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
            "origin": printable(origin),
        }
        for at, image, origin in zip(
            evaluated.mistakes, evaluated.images, evaluated.origins.tolist() or [""] * len(evaluated.mistakes)
        )
    ]


def _percent(probability: float) -> str:
    return f"{probability:.1%}" if probability >= 0.001 else "<0.1%"


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def by_class(runs: Sequence[History]) -> list[dict[str, Any]]:
    """The accuracy of each class in each run, the hardest first; empty if the runs do not share their classes.

    A run without predictions, perhaps in its first epoch, has empty cells.
    """
    evaluated = [run.evaluated for run in runs if run.evaluated is not None]
    if len({tuple(each.class_names.tolist()) for each in evaluated}) != 1:
        return []
    names = evaluated[0].class_names
    right, support = [], []
    for run in runs:
        label, predicted = (run.evaluated.label, run.evaluated.predicted) if run.evaluated else (NOTHING, NOTHING)
        right.append(np.bincount(label[label == predicted], minlength=len(names)))
        support.append(np.bincount(label, minlength=len(names)))
    support = np.array(support)
    shares = np.array(right) / np.maximum(support, 1)
    seen = support.sum(0) > 0
    known = support.sum(1) > 0
    if not known.any():
        return []
    order = np.lexsort((shares[known].mean(0), ~seen))
    return [
        {
            "name": names[at],
            "cells": [
                {"text": f"{share:.1%}" if images else "–", "width": f"{100 * share:.1f}"}
                for share, images in zip(shares[:, at], support[:, at])
            ],
        }
        for at in order
    ]
