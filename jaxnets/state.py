"""Everything that training changes."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxnets.models.initializers import init_at_once


@flax.struct.dataclass
class TrainState:
    """The state of one training run between two steps."""

    step: jax.Array  # int32: steps taken
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any  # {'params', 'batch_stats'} averaged over steps, or None

    @property
    def variables(self):
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create(
    key: jax.Array, model: nn.Module, optimizer: optax.GradientTransformation, image_size: int, ema: bool
) -> TrainState:
    """The state before the first step, for images of `image_size` pixels a side.

    Its weights, float32, are a function of `key` alone. ValueError if the net cannot take such images.
    """
    variables = init_at_once(model, key, jnp.zeros((1, image_size, image_size, 3)), train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        # A copy: the state is donated, and no buffer may be donated twice.
        ema=jax.tree.map(jnp.array, {"params": params, "batch_stats": batch_stats}) if ema else None,
    )
