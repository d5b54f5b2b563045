"""The parts of a run's page as its template takes them: headline, curves, time, fields. All text is plain."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxnets import charts, journal, settings, timing
from jaxnets.predictions import Evaluated

SERIES = tuple(name for name in charts.COLOURS if name.startswith("series-"))
TRAINING, EVALUATION, AVERAGED = SERIES[1], SERIES[0], SERIES[2]  # on a page with one run
FEW_CLASSES = 10  # for which top-5 accuracy says little
MAX_ROWS = 200  # in a table of evaluations
TIME_UNITS = ((1.0, "seconds", 180), (60.0, "minutes", 3 * 3600), (3600.0, "hours", np.inf))
# Title, field of the train records, field of the eval records, and options for its axis
CHARTS = (
    ("Loss", "loss", "eval_loss", {}),
    ("Accuracy", "accuracy", "eval_accuracy", {"percent": True}),
    ("Learning rate", "learning_rate", None, {"from_zero": True}),
    ("Images per second, training", "images_per_second", None, {"from_zero": True}),
)

Record = dict[str, Any]


@dataclass(frozen=True)
class History:
    """The history of a run, as its workdir holds it."""

    directory: Path
    name: str
    config: dict[str, Any]
    trained: list[Record]  # the train records of metrics.jsonl
    evaluations: list[Record]  # and the eval records
    spans: list[timing.Span]
    machines: list[Record]  # where it was trained, as returned by `machine.read`
    evaluated: Evaluated | None  # the last evaluation, example by example

    @property
    def throughput(self) -> list[Record]:
        """Training images per second in every span (an epoch, or its parts around an interruption), as records."""
        size = self.config.get("batch_size")
        if not isinstance(size, int):
            return []
        return [
            {"step": span.last, "images_per_second": (span.last - span.first) * size / span.training}
            for span in self.spans
            if span.last > span.first and span.training > 0
        ]

    @property
    def averaged(self) -> bool:
        """Whether the averaged weights were evaluated, too."""
        return any({"ema_eval_accuracy", "ema_eval_loss"} <= record.keys() for record in self.evaluations)

    def steps(self, records: Sequence[Record]) -> np.ndarray:
        return np.array([record["step"] for record in records], float)

    def seconds(self, records: Sequence[Record]) -> np.ndarray:
        return timing.elapsed(self.spans, self.steps(records))


def duration(seconds: float) -> str:
    """Seconds as a person would say them: 0.42 s, 3 min 5 s, 2 h 5 min."""
    if not np.isfinite(seconds):
        return "–"
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    unit, smaller, size = ("min", "s", 60) if seconds < 3599.5 else ("h", "min", 3600)
    whole, rest = divmod(round(seconds * 60 / size), 60)
    return f"{whole} {unit} {rest} {smaller}"


def lede(run: History) -> str:
    """The run in one line: net, data, length."""
    config = run.config
    width = (config.get("model") or {}).get("width")
    net = str((config.get("model") or {}).get("name")) + (f", width {width}" if width else "")
    epochs, records = config.get("num_epochs"), run.trained + run.evaluations
    last, at = (max(record[name] for record in records) for name in ("step", "epoch"))
    # A run ends only with its last evaluation.
    done = bool(run.evaluations) and run.evaluations[-1]["epoch"] == epochs
    state = f"{epochs} epochs" if done else f"epoch {at} of {epochs} so far"
    return f"{net}, on {config.get('dataset')}; {state}, {last:,} steps of {config.get('batch_size')} images"


def tiles(run: History) -> list[dict[str, str]]:
    """The headline numbers, each with a label and a note."""

    def tile(label, value, note=""):
        return {"label": label, "value": value, "note": note}

    made = []
    if run.evaluations:
        # If a run has averaged weights, those count, as in `compare`.
        which = "ema_eval_accuracy" if run.averaged else "eval_accuracy"
        scored = [record for record in run.evaluations if {which, which.replace("accuracy", "loss")} <= record.keys()]
        best, last = max(scored, key=lambda record: record[which]), scored[-1]
        images, loss = last.get("num_examples"), last[which.replace("accuracy", "loss")]  # large if it diverged
        of = [f"of {images:,} images"] if isinstance(images, int) else []
        if run.averaged:
            of.append("averaged weights")
        made += [
            tile("last accuracy", f"{last[which]:.2%}", ", ".join(of)),
            tile("best accuracy", f"{best[which]:.2%}", f"evaluation after epoch {best['epoch']}"),
            tile("last loss", f"{loss:.4f}" if loss < 1000 else f"{loss:.3g}", "evaluation, nats"),
        ]
        if run.averaged:
            made.append(tile("unaveraged weights", f"{last['eval_accuracy']:.2%}", "last accuracy"))
        top5 = which.replace("accuracy", "top5_accuracy")
        if top5 in last and run.evaluated is not None and len(run.evaluated.class_names) > FEW_CLASSES:
            made.append(tile("last top-5", f"{last[top5]:.2%}", "accuracy"))
    if speeds := [record["images_per_second"] for record in run.throughput]:
        made.append(tile("throughput", f"{np.median(speeds):,.0f}", "training images per second, median"))
    if run.spans:
        made.append(
            tile("time", duration(sum(timing.totals(run.spans).values())), "including compiling and evaluating")
        )
    return made


def legend(runs: Sequence[History]) -> list[dict[str, Any]]:
    """What each kind of line stands for."""
    if len(runs) > 1:
        names = [
            {
                "label": f"{run.name} (averaged weights)" if run.averaged else run.name,
                "colour": colour,
                "faint": False,
                "dash": dash,
            }
            for run, (colour, dash) in zip(runs, run_styles(len(runs)))
        ]
        return [*names, {"label": "thin: training", "colour": "muted", "faint": True, "dash": 0}]
    made = [
        {"label": "evaluation", "colour": EVALUATION, "faint": False, "dash": 0},
        {"label": "training", "colour": TRAINING, "faint": True, "dash": 0},
    ]
    if runs[0].averaged:
        made.insert(1, {"label": "evaluation, averaged weights", "colour": AVERAGED, "faint": False, "dash": 1})
    return made


def run_styles(count: int) -> list[tuple[str, int]]:
    """The colour and the dash pattern of each of several runs; runs that share a colour differ in their dashes."""
    return [(SERIES[number % len(SERIES)], number // len(SERIES) % len(charts.DASHES)) for number in range(count)]


def draw_charts(runs: Sequence[History]) -> list[dict[str, str]]:
    """Loss, accuracy, learning rate and throughput, over steps and, if known, over time."""
    axes = [("step", 1.0, "step")]
    longest = max((sum(timing.totals(run.spans).values()) for run in runs if run.spans), default=0.0)
    if longest:
        unit, name = next((u, n) for u, n, limit in TIME_UNITS if longest < limit)
        axes.append(("time", unit, name))
    drawn = (_draw_chart(runs, axis, unit, label, *chart) for axis, unit, label in axes for chart in CHARTS)
    return [chart for chart in drawn if chart]


def _draw_chart(runs, axis: str, unit: float, xlabel: str, title: str, trained: str, evaluated: str | None, look):
    """One chart with its title and description, or None if there is nothing to draw."""
    curves, descriptions = [], []

    def add(run, records, field, label, **style):
        records = [record for record in records if isinstance(record.get(field), int | float)]
        if not records:
            return
        x = run.steps(records) if axis == "step" else run.seconds(records) / unit
        if not np.isfinite(x).any():
            return
        y = np.array([record[field] for record in records], float)
        curves.append(charts.Curve(x, y, **style))
        descriptions.append(f"{label} from {y[0]:.4g} to {y[-1]:.4g}")

    for run, (colour, dash) in zip(runs, run_styles(len(runs))):
        several = len(runs) > 1
        name = f"{run.name}, " if several else ""
        style = {"colour": colour if several else TRAINING, "dash": dash}
        records = run.throughput if trained == "images_per_second" else run.trained
        marked = trained == "images_per_second"
        add(run, records, trained, f"{name}training", faint=bool(evaluated), marked=marked, **style)
        if evaluated and several:  # one line per run, of its averaged weights if it has them, as in `compare`
            field = f"ema_{evaluated}" if run.averaged else evaluated
            add(run, run.evaluations, field, f"{name}evaluation", marked=True, **style)
        elif evaluated:
            add(run, run.evaluations, evaluated, "evaluation", colour=EVALUATION, marked=True)
            add(run, run.evaluations, f"ema_{evaluated}", "averaged weights", colour=AVERAGED, dash=1, marked=True)
    if not curves:
        return None
    return {
        "axis": axis,
        "title": title,
        "svg": charts.draw_curves(f"{trained.replace('_', '-')}-{axis}", curves, xlabel=xlabel, **look),
        "description": f"{title} over {xlabel}: {'; '.join(descriptions)}",
    }


def evaluations(run: History) -> dict[str, Any]:
    """A row for each evaluation, with its epoch's training; beyond MAX_ROWS only every second, every third, ... one."""
    every = max(1, -(-len(run.evaluations) // MAX_ROWS))
    shown = run.evaluations[::-1][::every][::-1]  # including the last
    left_out = f"One in {every} is shown; metrics.jsonl has all {len(run.evaluations):,}." if every > 1 else ""
    seconds = run.seconds(shown)
    columns = ["epoch", "step", "time", "learning rate"]
    columns += ["training loss", "training accuracy", "evaluation loss", "evaluation accuracy"]
    if run.averaged:
        columns.append("averaged accuracy")
    means = journal.epoch_means(run.trained)
    rates = {record["epoch"]: record.get("learning_rate") for record in run.trained}  # each epoch's last
    rows = []
    for record, when in zip(shown, seconds):
        trained = means.get(record["epoch"], {})
        row = [
            record["epoch"],
            f"{record['step']:,}",
            duration(when),
            _shown(rates.get(record["epoch"]), ".3g"),
            _shown(trained.get("loss"), ".4f"),
            _shown(trained.get("accuracy"), ".2%"),
            f"{record['eval_loss']:.4f}",
            f"{record['eval_accuracy']:.2%}",
        ]
        if run.averaged:
            row.append(_shown(record.get("ema_eval_accuracy"), ".2%"))
        rows.append(row)
    return {"columns": columns, "rows": rows, "left_out": left_out}


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def phases(run: History) -> list[dict[str, Any]]:
    """The phases, the longest first, with their shares of the total."""
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
    """The configuration by dotted names, without the fields that are left to the net."""
    flat = settings.flatten(config)
    return [(name, _value(value)) for name, value in flat.items() if value is not None]


def differences(configs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The fields, by dotted name, in which some runs differ, except data_dir."""
    flat = [settings.ADDED | settings.flatten(config) for config in configs]
    names = dict.fromkeys(name for config in flat for name in config)
    rows = [(name, [_value(config.get(name)) for config in flat]) for name in names if name != "data_dir"]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)
