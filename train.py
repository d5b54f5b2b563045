"""Train a net: `python train.py --config=configs/mnv2.py --workdir=runs/mnv2`.

Any field of the configuration is a flag: `--config.num_epochs=3 --config.model.width=0.5`; configs/default.py lists
them all. Running the same command again resumes a stopped run. Log lines go to standard error; the last line of
standard output is one JSON object with the final evaluation.
"""

from jaxnets import interruption

if __name__ == "__main__":
    interruption.end_at_once()

import json
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from jaxnets import config_file, distributed, loop, runtime
from jaxnets.errors import UserError, exit_on_user_error

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/mnv2.py.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and logs; default: runs/<name of the configuration>."
)
COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0, for several processes started without a scheduler.",
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, counting from 0.", lower_bound=0)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse absl's flags; UserError for an unknown flag or configuration field, or a value that it cannot have."""
    return config_file.parse(flags.FLAGS, argv)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; fields are set as --config.FIELD=VALUE")
    if not flags.FLAGS["config"].present:
        raise UserError("--config is missing; try --config=configs/digits.py (--help lists the flags)")
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    config = config_file.require_config(CONFIG.value, path)
    if WORKDIR.value == "":
        raise UserError("--workdir is empty; leave it out for runs/<name of the configuration>")
    if config.get("deterministic"):  # before anything asks for the cluster's devices
        runtime.make_deterministic()
    with distributed.joined(COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value):
        result = loop.train(config, WORKDIR.value or Path("runs") / config_file.name_of(path))
        if distributed.is_primary():
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    app.run(exit_on_user_error(main), flags_parser=exit_on_user_error(parse_flags))
