"""`train.py` with the tiny net and its configuration: `python -m tests.tiny_run --config=tests/tiny_run.py FLAGS`."""

import os

from jaxnets import interruption

if __name__ == "__main__":
    interruption.end_at_once()

from absl import app

import train
from jaxnets import distributed, models, report
from jaxnets.errors import exit_on_user_error
from tests.tiny_net import TinyNet, small_digits


def get_config():
    """Two epochs of five steps on a few small digits; every step is a call and a record."""
    config = small_digits()
    config.steps_per_call = config.log_every_steps = 1
    return config


def main() -> None:
    """What `train.py` does, with one net more; a lost process may be missed after TINY_HEARTBEAT_SECONDS.

    With TINY_UNDRAWN it has no page.
    """
    models.MODELS["tiny"] = TinyNet
    if "TINY_UNDRAWN" in os.environ:
        report.write = lambda workdirs: None
    distributed.HEARTBEAT_SECONDS = int(os.environ.get("TINY_HEARTBEAT_SECONDS", distributed.HEARTBEAT_SECONDS))
    app.run(exit_on_user_error(train.main), flags_parser=exit_on_user_error(train.parse_flags))


if __name__ == "__main__":
    main()
