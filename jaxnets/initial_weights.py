"""The initial weights of a run with `config.init_from`: from a file, or from another run."""

from pathlib import Path

import numpy as np

from jaxnets import checkpoint, torch_weights, trained_run, weight_images, workdir
from jaxnets.errors import UserError
from jaxnets.plain_files import user_path
from jaxnets.plan import Plan, Variables
from jaxnets.runtime import logger
from jaxnets.weights.weight_files import Weights, spelled


def load(plan: Plan) -> Variables:
    """The variables in `config.init_from`, for this run's net; without the classifier if its shape differs.

    The classifier is then initialised from the run's seed.

    Raises UserError if there is no such file, or it holds the weights of another net.
    """
    config, source = plan.config, user_path(plan.config.init_from)
    try:
        weights = _weights_of_run(source) if source.is_dir() else source
        published = torch_weights.load_published(plan.model, weights, head="drop")
    except UserError as error:
        raise UserError(f"config.init_from={config.init_from!r}: {error}") from None
    classes = published.num_classes or plan.model.num_classes
    of_images = weight_images.known_normalization(config.model.name, classes, published)
    if of_images and not np.allclose(of_images, (tuple(config.mean), tuple(config.std)), rtol=0.01):
        logger.warning("the weights of config.init_from expect another normalisation of images: %s", spelled(of_images))
    if not published.head_is_new:
        return published.variables
    logger.info("config.init_from=%r has another classifier, or none: this run starts with a new one", config.init_from)
    body = {name: tree for name, tree in published.variables["params"].items() if name != "classifier"}
    return published.variables | {"params": body}


def _weights_of_run(directory: Path) -> Weights:
    """The weights in a workdir, as from a file that says everything about its net and images."""
    run = trained_run.load_run(directory, _best_or_latest(directory))
    if run.config.get("ema_decay"):
        logger.info(
            "these are the weights as trained; for their moving average, use jaxnets.convert --ema %s FILE", directory
        )
    state_dict = torch_weights.export(run.model, run.variables, "jaxnets")
    return Weights(state_dict, True, str(directory), run.images, torch_weights.fields_of(run.model))


def _best_or_latest(directory: Path) -> str:
    """Which checkpoint of a workdir to start from: the best, or if none was evaluated the latest, which is logged."""
    if not (directory / workdir.CONFIG).exists() or checkpoint.has_best(directory):
        return "best"
    logger.info("config.init_from=%r has not been evaluated yet: using its latest checkpoint", str(directory))
    return "latest"
