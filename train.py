"""Train a net: `python train.py --config=configs/mnv2.py --workdir=runs/mnv2`.

Any field of the configuration is a flag: `--config.num_epochs=3 --config.model.width=0.5`; the fields stand in
configs/default.py. The same command again goes on where a run was stopped. Log lines go to standard error;
the last line on standard output is one JSON object with the final evaluation.
"""

import json
from pathlib import Path

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from jaxnets import loop
from jaxnets.errors import UserError, exit_on_user_error

CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/mnv2.py.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and logs; default: runs/<name of the configuration>."
)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flags, with one sentence for a field or a file that does not exist."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{' '.join(argv[1:])}: {' '.join(str(error).split())}") from None


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; fields are set as --config.FIELD=VALUE")
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    if not path:
        raise UserError("--config is missing; try --config=configs/digits.py (--help lists the flags)")
    if not isinstance(CONFIG.value, ml_collections.ConfigDict):
        raise UserError(f"--config={path} cannot be loaded: there is no such file, or it fails when it is run")
    name = "_".join([Path(path.split(":")[0]).stem, *path.split(":")[1:]])
    result = loop.train(CONFIG.value, WORKDIR.value or Path("runs") / name)
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(exit_on_user_error(main), flags_parser=exit_on_user_error(parse_flags))
