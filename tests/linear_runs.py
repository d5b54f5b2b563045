"""Checkpoints of a net with parameters and statistics, and nothing else."""

from contextlib import closing

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxnets import checkpoint, optim, state

TOTALS = {"loss": 0.1 + 0.2, "correct": 5, "count": 32}


class Linear(nn.Module):
    """A net with parameters and statistics, and nothing else."""

    features: int = 3

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(self.features)(images.mean((1, 2)))
        return nn.BatchNorm(use_running_average=not train)(x)


def make_state(seed=0, features=3, optimizer="sgd", ema=True, step=0):
    chain = optim.make_optimizer(optimizer, optax.constant_schedule(0.1))
    made = state.create(jax.random.key(seed), Linear(features), chain, 4, ema)
    return made.replace(step=jnp.int32(step))


def template(**fields):
    return jax.eval_shape(lambda: make_state(**fields))


def save_six(workdir):
    """Checkpoints of steps 1 to 6, the best of them step 2, the last without an evaluation."""
    with closing(checkpoint.open_manager(workdir, keep=3)) as manager:
        for step, accuracy in enumerate([0.1, 0.9, 0.3, 0.4, 0.9 - 1e-9, None], start=1):
            metrics = None if accuracy is None else {"eval_accuracy": accuracy}
            checkpoint.save(manager, make_state(seed=step, step=step), TOTALS, metrics)


def damage(path):
    """Flip one bit in the middle of every file below a path (Orbax keeps some of them twice)."""
    for file in path.rglob("*"):
        if file.is_file() and (content := bytearray(file.read_bytes())):
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
