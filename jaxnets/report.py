"""Draw the page of a run, or of several on shared axes: curves, mistakes, time and configuration in one file.

A run keeps its own page, report.html in its workdir, up to date while it trains. With several workdirs, the page
compares them and is written to --out. The file is self-contained and needs no network.
"""

from jaxnets import interruption

if __name__ == "__main__":
    interruption.end_at_once()

import collections
import datetime
import importlib.resources
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxnets import data, journal, machine, predictions, report_errors, report_parts, runtime, settings, step, timing
from jaxnets.errors import ArgumentParser, UserError, as_utf8, exit_on_user_error, writing
from jaxnets.plain_files import open_at_once, replacing, user_path
from jaxnets.report_parts import History
from jaxnets.workdir import CONFIG

FILE = "report.html"
COMPARISON = "comparison.html"
_MARK = '<meta name="generator" content="jaxnets.report">'  # written by the template: a page of ours


def load(workdir: Path, name: str | None = None) -> History:
    """The history of a run, from its workdir.

    Raises UserError if there is no run, or it has recorded nothing yet. Predictions that cannot be read are
    reported in the log and left out.
    """
    config = settings.read(workdir / CONFIG).to_dict()
    # Anything but a number is damage.
    records = [
        {name: value for name, value in record.items() if _is_number(value)}
        for record in journal.read(workdir)
        if isinstance(record, dict)
    ]
    records = [record for record in records if _has(record, "step", "epoch")]
    trained = [record for record in records if _has(record, "loss", "accuracy")]
    evaluations = [record for record in records if _has(record, "eval_loss", "eval_accuracy")]
    if not trained + evaluations:
        raise UserError(f"{workdir} has no records in {journal.FILE} yet: the run has not trained")
    evaluated = None
    try:
        evaluated = predictions.load(workdir)
    except UserError as error:
        runtime.logger.warning("%s; they are left out", error)
    return History(
        workdir,
        name or name_of(workdir),
        config,
        trained,
        evaluations,
        timing.read(workdir),
        machine.read(workdir),
        evaluated,
    )


def name_of(workdir: Path) -> str:
    """The folder's name, preceded by the net's for a comparison's run, whose own folder is named after its seed."""
    folder = workdir.resolve()
    return f"{folder.parent.name}/{folder.name}" if re.fullmatch(r"seed\d+", folder.name) else folder.name


def _is_number(value) -> bool:
    return isinstance(value, int | float) and -timing.MAX_STEP < value < timing.MAX_STEP  # so no NaN either


def _has(record: dict, *names: str) -> bool:
    return record.keys() >= {*names}


def fill_template(name: str, **values) -> str:
    """A template of this package, filled in; text in the values is escaped, unless the template says otherwise."""
    import jinja2  # in the page's thread, so as not to delay the first step

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = importlib.resources.files("jaxnets").joinpath(name).read_text(encoding="utf-8")
    return environment.from_string(template).render(values)


def render(runs: Sequence[History]) -> str:
    """The page of one run, or of several compared, as HTML."""
    several = len(runs) > 1
    drawn = [_run_parts(run, colour) for run, (colour, _) in zip(runs, report_parts.run_styles(len(runs)))]
    charts = report_parts.draw_charts(runs)
    longest = max((len(name) for run in drawn if run["errors"] for name in run["errors"]["class_names"]), default=0)
    return fill_template(
        "report.html.jinja",
        title=f"{len(runs)} runs compared" if several else runs[0].name,
        lede=", ".join(run.name for run in runs) if several else report_parts.lede(runs[0]),
        runs=drawn,
        tiles=list(dict.fromkeys(label for run in drawn for label in run["tiles"])),
        legend=report_parts.legend(runs),
        charts=charts,
        timed=any(chart["axis"] == "time" for chart in charts),
        differences=report_parts.differences([run.config for run in runs]),
        by_class=report_errors.by_class(runs) if several else [],
        shown=report_errors.MAX_TABLE,
        label_width=min(max(0.62 * longest, 3.5), 8),
        drawn=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _run_parts(run: History, colour: str) -> dict:
    return {
        "name": run.name,
        "directory": str(run.directory),
        "colour": colour,
        "lede": report_parts.lede(run),
        "tiles": {tile["label"]: tile for tile in report_parts.tiles(run)},
        "evaluations": report_parts.evaluations(run),
        "errors": report_errors.mistakes(run),
        "no_errors": f"No evaluation has saved {predictions.FILE} in the workdir.",
        "time": report_parts.phases(run),
        "machines": [machine.dated_sentence(where) for where in run.machines],
        "fields": report_parts.fields(run.config),
    }


def write(workdirs: Sequence[Path], out: Path | None = None, tag: str = "") -> Path:
    """Draw one page of all workdirs; returns the file, which is written completely or not at all.

    `out` is by default report.html in the workdir, comparison.html for several; `tag` is `replacing`'s. Raises
    UserError for a workdir without a run, and if `out` is a file that is not such a page, or cannot be written.
    """
    out = out or (workdirs[0] / FILE if len(workdirs) == 1 else Path(COMPARISON))
    try:
        with open(out, encoding="utf-8", errors="replace", opener=open_at_once) as page:
            ours = _MARK in page.read(1000)
    except (FileNotFoundError, NotADirectoryError):
        ours = True  # there is nothing yet
    except UserError:  # a folder, a pipe, a terminal
        ours = False
    except OSError as error:
        raise UserError(f"{out} cannot be read: {error.strerror}") from None
    if not ours:
        raise UserError(f"{out} exists and is not a page of jaxnets.report; choose another --out")
    names = [name_of(workdir) for workdir in workdirs]
    # Folders of the same name are told apart by their paths.
    runs = [load(w, str(w) if names.count(name) > 1 else name) for w, name in zip(workdirs, names)]
    page = render(runs)
    with writing(out, ""), replacing(out, tag) as scratch:
        scratch.write_text(as_utf8(page), encoding="utf-8")
    return out


class LivePage:
    """Draws the page of a run that is training, in a thread; a failure is only logged.

    It takes a tenth of the time at most, except for `redraw`: drawing keeps Python from dispatching steps, which take
    milliseconds on a GPU.
    """

    def __init__(self, workdir: Path, split: data.Split):
        self._workdir, self._split = workdir, split
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="report")
        self._wanted: collections.deque[tuple[int, step.Predictions]] = collections.deque(maxlen=1)
        self._due, self._closing = 0.0, threading.Event()

    def update(self, at: int, predicted: step.Predictions) -> None:
        """Draw the run as it is now, with the predictions of step `at`, or soon with newer ones; returns at once."""
        self._wanted.append((at, predicted))
        self._pool.submit(self._draw_wanted)

    def redraw(self) -> None:
        """Draw the run as it is now, with the predictions it has saved; returns at once."""
        self._pool.submit(self._draw)

    def close(self) -> None:
        """Wait until everything requested is drawn."""
        self._closing.set()
        self._pool.shutdown()

    def _draw_wanted(self) -> None:
        self._closing.wait(self._due - time.monotonic())
        if self._wanted:  # otherwise an earlier drawing has shown it
            began = time.monotonic()
            self._draw(*self._wanted.pop())
            now = time.monotonic()
            self._due = now + 9 * (now - began)

    def _draw(self, at: int | None = None, predicted: step.Predictions | None = None) -> None:
        try:
            if predicted:
                predictions.save(self._workdir, at, predicted, self._split)
            write([self._workdir])
        except Exception as error:  # whatever it is, the run is worth more than its page
            runtime.logger.warning("%s was not drawn: %s: %s", FILE, type(error).__name__, error)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m jaxnets.report",
        description=__doc__,
        usage="%(prog)s [-h] --workdir=DIR [DIR ...] [--out=FILE]",
    )
    parser.add_argument("--workdir", type=user_path, action="append", default=[], help="the folder of a run")
    parser.add_argument("more", type=user_path, nargs="*", metavar="DIR", help="further runs to compare with it")
    parser.add_argument(
        "--out", type=user_path, help=f"the page; default: {FILE} in the workdir; for several runs, {COMPARISON}"
    )
    return parser


def main(argv: list[str]) -> None:
    """Run the command; it prints the name of the file."""
    args = _parser().parse_mixed_args(argv[1:])
    runtime.configure_logging()
    workdirs = [*args.workdir, *args.more]
    if not workdirs:
        raise UserError("give the folder of a run: --workdir=DIR")
    # The run may be training and drawing its page at this very moment.
    print(as_utf8(str(write(workdirs, args.out, ".command"))))


if __name__ == "__main__":
    exit_on_user_error(main)(sys.argv)
