"""`train.py` with the tiny net and its configuration: `python -m tests.tiny_run --config=tests/tiny_run.py FLAGS`."""

from absl import app

import train
from configs import digits
from jaxnets import models
from jaxnets.errors import exit_on_user_error
from tests.tiny_net import TinyNet


def get_config():
    """Two epochs of five steps on a few small digits; every step is a call and a record."""
    config = digits.get_config()
    config.train_split, config.eval_split = "train[:160]", "test[:50]"
    config.image_size = 16
    config.augment.crop_padding = 1
    config.model.name = "tiny"
    config.model.stem_stride = None
    config.model.width = None
    config.batch_size, config.eval_batch_size = 32, 16
    config.num_epochs = 2
    config.steps_per_call = config.log_every_steps = 1
    config.sync_batch_norm = True
    config.num_workers = 0
    return config


if __name__ == "__main__":
    models.MODELS["tiny"] = TinyNet
    app.run(exit_on_user_error(train.main), flags_parser=exit_on_user_error(train.parse_flags))
