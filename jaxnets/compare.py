"""Train nets side by side, each with several seeds, and write a table and a page of what they reach and cost.

`--models` lists nets, with fields of their own if wanted, as in `mobilenet_v2_cifar:width=0.5`, or patterns of names,
such as `shufflenet_v2*_cifar`; without it the nets are those of the configurations, of which there may be several.
Fields of all runs are set as in `--config.num_epochs=3`. `--against=torch` also trains every net in PyTorch, from the
same weights and with the same recipe. Every run has a workdir in OUT/runs; running the same command again resumes
where it stopped and skips finished runs. OUT/compare.{md,json,csv,html} are rewritten after every run.
Standard output is the table, then one JSON object on the last line. If a run fails, the others are still finished, and
the command exits with status 1.
"""

from jaxnets import interruption

if __name__ == "__main__":
    interruption.end_at_once()

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from jaxnets import compare_results, compare_runs, config_file, cores, tables
from jaxnets.arguments import count
from jaxnets.compare_entries import (
    DEFAULT,
    PRESETS,
    TORCH,
    Preset,
    beside_torch,
    default_config,
    load_configs,
    make_entries,
    split_models,
)
from jaxnets.errors import ArgumentParser, UserError, exit_on_user_error
from jaxnets.plain_files import user_path
from jaxnets.settings import LIMITS


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m jaxnets.compare", description=__doc__)
    parser.add_argument(
        "--out",
        type=user_path,
        default=Path("runs") / compare_runs.STEM,
        help="folder of the runs, the table and the page; default: runs/compare",
    )
    parser.add_argument("--models", help="nets, separated by commas; default: those of the configurations")
    parser.add_argument("--config", action="append", help=f"configuration file; may be repeated; default: {DEFAULT}")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="a named comparison: its nets and fields")
    parser.add_argument("--against", choices=(TORCH,), help="train every net in PyTorch too, on the same data")
    parser.add_argument("--seeds", type=count, default=3, help="runs of each net, from config.seed up; default: 3")
    parser.add_argument("--latency_size", type=int, help="side in pixels of the timed images; default: the run's")
    parser.add_argument(
        "--latency_batch", type=int, default=32, help="images in the timed batch; 0: no latency; default: 32"
    )
    parser.add_argument(
        "--train_accuracy",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="evaluate finished runs on their training images too: a third of an epoch's time each; default: yes",
    )
    parser.add_argument(
        "--note", default="", help="a sentence to print below the table, such as which copy of the data was used"
    )
    return parser


def main(argv: list[str]) -> None:
    """Run the command; the last line it prints is the JSON result.

    Raises UserError for bad input, before any training, and at the end if a run or a timing failed.
    """
    args, overrides = _parser().parse_known_args(argv[1:])
    config_file.check_overrides(overrides)
    if args.against:
        # Otherwise XLA takes most of a GPU's memory at once and keeps it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        # Otherwise PyTorch, imported later, runs one thread per physical core, where XLA runs one per hardware thread.
        os.environ.setdefault("OMP_NUM_THREADS", str(cores.count()))
    for name, least, most in (("latency_batch", 0, "eval_batch_size"), ("latency_size", 1, "image_size")):
        value = getattr(args, name)
        if value is not None and not least <= value <= LIMITS[most]:
            raise UserError(f"--{name}={value} must be from {least} to {LIMITS[most]}")
    preset = PRESETS.get(args.preset, Preset((), ()))
    models = preset.models if args.models is None else split_models(args.models)
    # The user's overrides come last, so they win.
    configs = load_configs(args.config or [default_config()], [*preset.overrides, *overrides], models)
    entries = make_entries(configs, models)
    comparison = compare_runs.run(
        beside_torch(entries) if args.against else entries,
        args.seeds,
        args.out,
        latency_size=args.latency_size or preset.latency_size,
        latency_batch=args.latency_batch,
        command=shlex.join(["python", "-m", "jaxnets.compare", *argv[1:]]),
        note=args.note,
        train_accuracy=args.train_accuracy,
    )
    print(tables.markdown(compare_results.table(comparison)))
    failed = compare_results.failures(comparison["nets"])
    runs = sum(len(net["runs"]) for net in comparison["nets"])
    print(json.dumps({"page": str(args.out / f"{compare_runs.STEM}.html"), "runs": runs, "failed": failed}))
    compare_results.require_finished(failed)


if __name__ == "__main__":
    exit_on_user_error(main)(sys.argv)
