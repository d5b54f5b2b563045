"""The learning-rate schedule, the Optax chain, and which parameters decay."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from optax import contrib

OPTIMIZERS = ("sgd", "adamw", "rmsprop", "lion", "muon")
COUPLED = ("sgd", "rmsprop")  # their weight decay is part of the gradient
MUON_RMS = 0.2  # root mean square of its updates, as of Adam's (2502.16982, section 2.2)
SCHEDULES = ("cosine", "linear", "step", "exponential", "constant", "one_cycle")
BATCH_SCALINGS = ("none", "linear", "sqrt")
BASE_BATCH_SIZE = 256  # whose learning rate the scaling rules start from


def scale_rate(rate: float, batch_size: int, scaling: str) -> float:
    """The learning rate for a batch size, from that for batches of 256: times their ratio or its square root.

    none: unchanged. linear: arXiv 1706.02677, section 2.1. sqrt: keeps the variance of an update (1404.5997).
    ValueError for any other rule.
    """
    if scaling not in BATCH_SCALINGS:
        raise ValueError(f"unknown batch scaling {scaling!r}; there are {', '.join(BATCH_SCALINGS)}")
    exponent = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[scaling]
    return rate * (batch_size / BASE_BATCH_SIZE) ** exponent


def make_schedule(
    name: str,
    peak: float,
    *,
    steps_per_epoch: int,
    num_epochs: int,
    warmup_epochs: float = 0.0,
    end_factor: float = 0.0,
    boundaries: tuple[float, ...] = (0.5, 0.75),
    decay: float = 0.1,
) -> optax.Schedule:
    """Learning rate as a function of the step: linear warm-up to `peak`, then the named decay.

    The warm-up takes at most half of the run.

    cosine, linear: to `peak * end_factor` just after the last step. step: times `decay` at each of `boundaries`
    (fractions of the run). exponential: times `decay` every epoch, smoothly. one_cycle (1708.07120) has the rates of
    PyTorch's OneCycleLR but leaves the momentum alone: the warm-up is half a cosine from `peak / 25`, the decay another
    to `peak / 250000`, just after the last step. ValueError for any other name.
    """
    total = steps_per_epoch * num_epochs
    warmup = min(round(min(warmup_epochs, num_epochs) * steps_per_epoch), total // 2)
    rest = max(total - warmup, 1)
    if name == "one_cycle":
        return optax.cosine_onecycle_schedule(total, peak, (warmup + 0.5) / total)  # rounded down to steps by Optax
    if name == "cosine":
        body = optax.cosine_decay_schedule(peak, rest, end_factor)
    elif name == "linear":
        body = optax.linear_schedule(peak, peak * end_factor, rest)
    elif name == "step":
        factors: dict[int, float] = {}
        for fraction in boundaries:
            at = max(round(fraction * total) - warmup, 0)
            factors[at] = factors.get(at, 1.0) * decay
        body = optax.piecewise_constant_schedule(peak, factors)
    elif name == "exponential":
        body = optax.exponential_decay(peak, steps_per_epoch, decay)
    elif name == "constant":
        body = optax.constant_schedule(peak)
    else:
        raise ValueError(f"unknown schedule {name!r}; there are {', '.join(SCHEDULES)}")
    if not warmup:
        return body
    # The first step learns too: the ramp is (step + 1) / warmup.
    return optax.join_schedules([lambda step: peak * (step + 1) / warmup, body], [warmup])


def decay_mask(params, decay_depthwise: bool = True, decay_vectors: bool = False):
    """True for leaves that weight decay shrinks: kernels and, with `decay_vectors`, biases and BatchNorm parameters.

    Without `decay_depthwise`, depthwise kernels are exempt.
    """

    def decays(path, leaf):
        is_depthwise = leaf.ndim == 4 and leaf.shape[2] == 1
        return decay_depthwise or not is_depthwise if path[-1].key == "kernel" else decay_vectors

    return jax.tree_util.tree_map_with_path(decays, params)


def stack(tree):
    """The leaves of `tree` as Muon takes them: `{'matrices': {shape: (L, h, w, I, O)}, 'rest': {path: leaf}}`.

    Kernels of the same shape are one array, so that their products are batched: fewer and larger. The rest, for Adam: a
    dense classifier (but not SqueezeNet's, which is a convolution), depthwise kernels (whose rows are channels that
    never mix), BatchNorm, biases. The groups of a grouped kernel never mix either, but are orthogonalised together,
    side by side in one matrix.
    """
    matrices, rest = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if _is_matrix(leaf):
            matrices.setdefault(_shape_name(leaf), []).append(leaf)
        else:
            rest[_path_name(path)] = leaf
    return {"matrices": {name: jnp.stack(leaves) for name, leaves in matrices.items()}, "rest": rest}


def unstack(stacked, like):
    """The tree, with the structure and shapes of `like`, from which `stack` made `stacked`."""
    matrices = {name: iter(leaves) for name, leaves in stacked["matrices"].items()}

    def leaf_of(path, leaf):
        return next(matrices[_shape_name(leaf)]) if _is_matrix(leaf) else stacked["rest"][_path_name(path)]

    return jax.tree_util.tree_map_with_path(leaf_of, like)


def _is_matrix(leaf) -> bool:
    return leaf.ndim == 4 and leaf.shape[2] > 1


def _shape_name(leaf) -> str:
    return "x".join(map(str, leaf.shape))


def _path_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def over_stacks(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transformation` applied to stacked gradients and parameters; its state is of stacks too."""

    def update(gradients, state, params=None):
        updates, state = transformation.update(stack(gradients), state, None if params is None else stack(params))
        return unstack(updates, gradients), state

    return optax.GradientTransformation(lambda params: transformation.init(stack(params)), update)


def muon_dimensions(stacked):
    """How Muon sees each leaf of `stack`: convolutions as matrices, inputs by outputs; the rest as None, for Adam."""
    as_matrices = contrib.MuonDimensionNumbers(reduction_axis=(1, 2, 3), output_axis=4)
    dimensions = {"matrices": as_matrices, "rest": None}
    return {part: dict.fromkeys(leaves, dimensions[part]) for part, leaves in stacked.items()}


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    decay_depthwise: bool = True,
    decay_vectors: bool = False,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Clipping, the named update, weight decay, learning rate.

    Weight decay is PyTorch's: part of the gradient for sgd and rmsprop, decoupled for adamw, lion and muon.
    muon's orthogonal updates have the size of Adam's (2502.16982, section 2.2), so one learning rate serves both.
    """
    mask = partial(decay_mask, decay_depthwise=decay_depthwise, decay_vectors=decay_vectors)
    shrink = optax.add_decayed_weights(weight_decay, mask=mask)
    accumulate = optax.trace(momentum, nesterov=nesterov and name == "sgd") if momentum else optax.identity()
    if name == "sgd":
        update = optax.chain(shrink, accumulate)
    elif name == "rmsprop":
        update = optax.chain(shrink, optax.scale_by_rms(beta2, epsilon, eps_in_sqrt=False), accumulate)
    elif name == "adamw":
        update = optax.chain(optax.scale_by_adam(beta1, beta2, epsilon), shrink)
    elif name == "lion":
        update = optax.chain(optax.scale_by_lion(beta1, beta2), shrink)
    elif name == "muon":
        direction = contrib.muon(
            -1.0,  # the direction alone: sign, rate and decay come after
            beta=momentum,
            eps=epsilon,
            nesterov=nesterov,
            adam_b1=beta1,
            adam_b2=beta2,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=MUON_RMS,
        )
        update = optax.chain(over_stacks(direction), shrink)
    else:
        raise ValueError(f"unknown optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    return optax.chain(clip, update, optax.scale_by_learning_rate(schedule))


def update_ema(ema, values, decay: float, step):
    """Exponential moving average of a tree after step number `step` (from 1), with a ramp at the start.

    The ramp, min(decay, (1 + step) / (10 + step)), forgets the initial weights early.
    """
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: rate * old + (1 - rate) * new, ema, values)
