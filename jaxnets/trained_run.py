"""A trained run as its workdir holds it: configuration, net, and the weights of one of its checkpoints."""

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from jaxnets import checkpoint, settings
from jaxnets.errors import UserError
from jaxnets.models.initializers import init_shapes
from jaxnets.plain_files import user_path
from jaxnets.restore import require_same_shapes, restore_ema, restore_variables
from jaxnets.weights.weight_files import Images
from jaxnets.workdir import CONFIG


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds at one of its checkpoints."""

    config: ml_collections.ConfigDict
    model: nn.Module
    variables: dict[str, Any]
    step: int

    @property
    def images(self) -> Images:
        """The images that its net expects, as a weight file describes them."""
        config = self.config
        return Images((tuple(config.mean), tuple(config.std)), config.image_size, config.crop)


def load_run(workdir: str | Path, which: str | int = "best", *, ema: bool = False) -> Run:
    """The net of a run at its checkpoint "best", "latest" or a step; with `ema` its averaged weights.

    Raises UserError if there is no such run or checkpoint, or it is damaged or of another model.
    """
    workdir = user_path(workdir)
    config = settings.read(workdir / CONFIG)
    settings.check_evaluation(config)
    try:
        at, variables, averaged = _restore(workdir, which, ema)
    except UserError:  # if the run is training, the checkpoint may have been deleted for a newer one meanwhile
        at, variables, averaged = _restore(workdir, which, ema)
    where = f"checkpoint {at} in {workdir}"
    try:
        # The number of classes is taken from the checkpoint, so that the data set need not be there.
        num_classes = variables["params"]["classifier"]["kernel"].shape[-1]
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{where} holds no classifier") from None
    if ema and averaged is None:
        raise UserError(f"{where} has no averaged weights (config.ema_decay was 0)")
    model = settings.make_model(config, num_classes)
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    try:
        expected = init_shapes(model, images)
    except Exception as error:  # a configuration from elsewhere can ask for impossible sizes
        raise UserError(f"{workdir / CONFIG} describes a net that cannot be made: {str(error)[:300]}") from error
    require_same_shapes(variables, {"params": {}, "batch_stats": {}} | expected, where)
    if ema:
        require_same_shapes(averaged, variables, f"the average in {where}")
    return Run(config, model, averaged if ema else variables, at)


def _restore(workdir: Path, which: str | int, ema: bool) -> tuple[int, dict[str, Any], dict[str, Any] | None]:
    """A checkpoint's step, its variables and, with `ema`, the averaged ones, None if there are none."""
    with closing(checkpoint.open_reader(workdir)) as manager:
        at = checkpoint.find_step(manager, which, ema=ema)
        return at, restore_variables(manager, at), restore_ema(manager, at) if ema else None
