"""Make a figure of an experiment from the papers: its data as JSON, the figure as PNG and PDF.

relu_collapse: what ReLU does to a curve in few dimensions. bottleneck_ablation: linear and non-linear bottlenecks,
and where shortcuts go. shuffle_ablation: ShuffleNetV1 without channel shuffle. width_tradeoff: accuracy against cost.
cost_breakdown: where MobileNetV1's parameters, arithmetic and time go. recipe_knobs: what each field of a recipe adds.
recipe_parts: the default recipe without each of its parts, with images that grow, and in larger batches.
Nets are trained in a small setting: on a laptop CPU a run takes a few minutes, and a figure of 8 to 24 runs half an
hour to an hour and a half. `--config.FIELD=VALUE` overrides any field (`--config.train_split=train
--config.num_epochs=60`). Running the same command again resumes where it stopped. The last line on standard output is
one JSON object. If a run fails, the figure shows the others, and the command exits with status 1.
"""

from jaxnets import interruption

if __name__ == "__main__":
    interruption.end_at_once()

import dataclasses
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxnets import compare_results, config_file, plots, runtime
from jaxnets.arguments import count
from jaxnets.compare_entries import DEFAULT, default_config
from jaxnets.errors import ArgumentParser, UserError, exit_on_user_error, writing
from jaxnets.figures import (
    bottleneck_ablation,
    cost_breakdown,
    recipe_knobs,
    recipe_parts,
    relu_collapse,
    shuffle_ablation,
    width_tradeoff,
)
from jaxnets.figures.options import SEEDS, Options
from jaxnets.plain_files import make_folder, read_own, replacing, set_aside, user_path

FIGURES: dict[str, ModuleType] = {
    "relu_collapse": relu_collapse,
    "bottleneck_ablation": bottleneck_ablation,
    "shuffle_ablation": shuffle_ablation,
    "width_tradeoff": width_tradeoff,
    "cost_breakdown": cost_breakdown,
    "recipe_knobs": recipe_knobs,
    "recipe_parts": recipe_parts,
}
WITH_KNOBS = [name for name, figure in FIGURES.items() if hasattr(figure, "KNOBS")]
MAX_BYTES = 1 << 28  # of a figure's data


def make(name: str, options: Options) -> tuple[dict[str, Any], list[Path]]:
    """Measure, write and draw a figure in `options.out`; returns its data and its files."""
    figure = FIGURES[name]
    out = options.out
    path, files = out / f"{name}.json", plots.files_of(out / name)
    before = check_out(path, files)
    if not figure.TRAINS:  # otherwise the comparison makes it, once its checks have passed
        make_folder(out)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    made = {"command": options.command, "date": today}
    data = figure.measure(dataclasses.replace(options, out=out / name, files=(path, *files))) | made
    if before and (getattr(figure, "TIMES", False) or _rows(before) - _rows(data)):
        with writing(out):
            kept = set_aside([path, *files])  # none if the comparison has done so
        if kept:
            runtime.logger.info("the earlier %s is kept as %s", path, kept[0].name)
    with writing(out), replacing(path) as scratch:
        scratch.write_text(json.dumps(data) + "\n")
    with plots.style():
        drawn = figure.draw(data)
    with writing(out):
        return data, [path, *plots.save(drawn, out / name)]


def _rows(data: dict[str, Any]) -> set[str]:
    """The labels of what a figure compares, only some of it with `--only`."""
    found = [*data.get("knobs", ()), *(each["shuffle"] for each in data.get("groups", ()))]
    return {each["label"] for each in found}


def check_out(path: Path, files: Sequence[Path]) -> dict[str, Any] | None:
    """The data of the figure at `path`, if there are any; UserError if it would overwrite files that are not ours."""

    def data_of(found: Any) -> dict[str, Any]:
        if not isinstance(found["compute"], str):
            raise TypeError
        _rows(found)  # raises what makes it none of ours
        return found

    return read_own([path, *files], "jaxnets.figures data", data_of, MAX_BYTES)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m jaxnets.figures", description=__doc__)
    parser.add_argument("name", metavar="NAME", choices=tuple(FIGURES), help=", ".join(FIGURES))
    parser.add_argument("--out", type=user_path, required=True, help="folder of the figure, and of the runs behind it")
    parser.add_argument("--seeds", type=count, help=f"runs of each net that is trained; default: {SEEDS}")
    parser.add_argument("--config", action="append", help=f"configuration of nets that are trained; default: {DEFAULT}")
    parser.add_argument(
        "--only",
        action="append",
        help=f"a knob to turn, of {', '.join(WITH_KNOBS)}; default: all",
    )
    parser.add_argument("--note", help="a few words to print below the figure, e.g. which data were used")
    return parser


def main(argv: list[str]) -> None:
    """Run the command; the last line it prints is the JSON result.

    Raises UserError for bad input, before any training, and at the end if a run failed.
    """
    args, overrides = _parser().parse_known_args(argv[1:])
    config_file.check_overrides(overrides)
    trains = FIGURES[args.name].TRAINS
    if not trains and (args.seeds or args.config or args.only or args.note or overrides):
        raise UserError(f"{args.name} trains no net: it takes only --out")
    if args.config and len(args.config) > 1:
        raise UserError("--config is given twice: a figure's nets are trained by one configuration")
    if args.only and args.name not in WITH_KNOBS:
        raise UserError(f"--only is for {', '.join(WITH_KNOBS)}: {args.name} has no knobs")
    runtime.configure_logging()
    runtime.require_device()
    command = shlex.join(["python", "-m", "jaxnets.figures", *argv[1:]])
    options = Options(
        args.out,
        seeds=args.seeds or SEEDS,
        config=args.config[0] if args.config else default_config() if trains else "",
        overrides=tuple(overrides),
        only=tuple(args.only or ()),
        note=args.note or "",
        command=command,
    )
    data, files = make(args.name, options)
    print(json.dumps({"figure": args.name, "files": [str(file) for file in files], "compute": data["compute"]}))
    compare_results.require_finished(data.get("failed", ()))


if __name__ == "__main__":
    exit_on_user_error(main)(sys.argv)
