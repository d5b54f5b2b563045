"""One training step and one evaluation step as pure functions, and their `pmap` over the devices.

The only module that spreads a run's state and batches over devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxnets.augment import augment, mix, normalize
from jaxnets.optim import update_ema
from jaxnets.state import TrainState

AXIS = "batch"

Batch = dict[str, jax.Array]  # {'image', 'label'[, 'mask']}, or {'index'[, 'mask']} into resident data


@flax.struct.dataclass
class TrainMetrics:
    """Of one step on the whole batch: mean loss (float32) and the number classified correctly (int32)."""

    loss: jax.Array
    correct: jax.Array


@flax.struct.dataclass
class EvalTotals:
    """Sums over evaluated examples, float32 loss and int32 counts; the last two per class."""

    loss: jax.Array
    correct: jax.Array
    correct_top5: jax.Array
    count: jax.Array
    class_correct: jax.Array
    class_count: jax.Array


@flax.struct.dataclass
class Predictions:
    """Of every example of a batch, masked ones too, `(N,)`: classes int32, probabilities float32."""

    label: jax.Array
    predicted: jax.Array  # the most probable class
    probability: jax.Array  # of that class
    label_probability: jax.Array


def gather(data: Batch, batch: Batch) -> Batch:
    """The examples at `batch['index']` of resident `data`; a streamed batch is returned as it is."""
    if "index" not in batch:
        return batch
    rest = {name: value for name, value in batch.items() if name != "index"}
    return rest | {name: jnp.take(values, batch["index"], axis=0) for name, values in data.items()}


def cross_entropy(logits, labels, smoothing: float = 0.0):
    """Softmax cross-entropy of each example, `(N, K)` float32 logits and `(N,)` labels to `(N,)`."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def mix_batch(keys, images, labels, mixing: dict[str, float]):
    """Each image mixed with the one before it by `augment.mix`: images, the other's labels, shares of its own.

    Batches are in random order, so a neighbour is as good as any other image.
    """
    keys = jax.vmap(partial(jax.random.fold_in, data=3))(keys)  # `augment` uses 0 to 2: a key is split into those
    images, shares = jax.vmap(partial(mix, **mixing))(keys, images, jnp.roll(images, 1, axis=0))
    return images, jnp.roll(labels, 1), shares


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    augmentation: dict[str, Any],
    mixing: dict[str, float] | None = None,
    label_smoothing: float = 0.0,
    ema_decay: float = 0.0,
    axis_name: str | None = None,
) -> tuple[TrainState, TrainMetrics]:
    """One update of `state` on this device's uint8 images: the new state and the whole batch's metrics.

    `key` is the run's key. `mixing` are the keywords of `augment.mix`; images mix with others on their device.
    `axis_name` averages gradients, statistics and metrics over devices.
    """
    mean_over_devices = partial(lax.pmean, axis_name=axis_name) if axis_name else lambda tree: tree
    device = lax.axis_index(axis_name) if axis_name else 0
    labels, size = batch["label"], batch["label"].shape[0]
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    # Counted over the whole batch: an image's augmentation is the same on any number of devices.
    image_keys = jax.vmap(partial(jax.random.fold_in, augment_key))(device * size + jnp.arange(size))
    images = jax.vmap(partial(augment, **augmentation))(image_keys, batch["image"])
    if mixing:
        images, others, shares = mix_batch(image_keys, images, labels, mixing)

    def objective(params):
        logits, updated = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(dropout_key, device)},
        )
        losses = cross_entropy(logits, labels, label_smoothing)
        if mixing:
            losses = shares * losses + (1 - shares) * cross_entropy(logits, others, label_smoothing)
        return losses.mean(), (logits, updated)

    (loss, (logits, updated)), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
    loss, gradients, batch_stats = mean_over_devices((loss, gradients, updated.get("batch_stats", {})))
    # For a mixed image, the class with the larger share counts.
    expected = jnp.where(shares >= 0.5, labels, others) if mixing else labels
    correct = (logits.argmax(-1) == expected).sum()
    correct = lax.psum(correct, axis_name) if axis_name else correct
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = update_ema(ema, {"params": params, "batch_stats": batch_stats}, ema_decay, state.step + 1)
    new_state = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
    return new_state, TrainMetrics(loss, correct)


def eval_step(
    variables: dict[str, Any],
    batch: Batch,
    *,
    model: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    axis_name: str | None = None,
) -> tuple[EvalTotals, Predictions]:
    """Sums over the examples of `batch` whose `mask` is set, over all devices; and this device's predictions."""
    logits = model.apply(variables, normalize(batch["image"], mean, std), train=False)
    classes, labels, mask = logits.shape[-1], batch["label"], batch["mask"]
    predicted = logits.argmax(-1)
    correct = (predicted == labels) & mask
    _, best = lax.top_k(logits, min(5, classes))
    one_hot = jax.nn.one_hot(labels, classes, dtype=jnp.int32)
    totals = EvalTotals(
        loss=jnp.where(mask, cross_entropy(logits, labels), 0).sum(),
        correct=correct.sum(),
        correct_top5=((best == labels[:, None]).any(-1) & mask).sum(),
        count=mask.sum(),
        class_correct=(one_hot * correct[:, None]).sum(0),
        class_count=(one_hot * mask[:, None]).sum(0),
    )
    probabilities = jax.nn.softmax(logits)
    of_label = jnp.take_along_axis(probabilities, labels[:, None], -1)[:, 0]
    predictions = Predictions(labels, predicted.astype(jnp.int32), probabilities.max(-1), of_label)
    return lax.psum(totals, axis_name) if axis_name else totals, predictions


def pmap_train(step: Callable, devices: list[jax.Device]) -> Callable:
    """`(state, data, batches, key) -> (state, metrics)`: K steps in one dispatch on all devices.

    `step` is `train_step` with its keywords bound, `data` the resident examples or {}, `batches` has
    leading axes (devices, K), and the metrics are `(K,)`. The state is donated.
    """

    def call(state, data, batches, key):
        return lax.scan(lambda state, batch: step(state, gather(data, batch), key), state, batches)

    return jax.pmap(
        call,
        axis_name=AXIS,
        in_axes=(None, None, 0, None),
        out_axes=None,  # equal on all devices: the plain tree, as Orbax and evaluation want it
        devices=devices,
        donate_argnums=0,
    )


def pmap_eval(step: Callable, devices: list[jax.Device]) -> Callable:
    """`(variables, data, batches) -> (EvalTotals, Predictions)` over K batches with leading axes as in training.

    The totals are of all devices, `(K, ...)`; the predictions `(devices, K, N)`: `unshard` brings them into order.
    """

    def call(variables, data, batches):
        return lax.scan(lambda _, batch: (None, step(variables, gather(data, batch))), None, batches)[1]

    return jax.pmap(call, axis_name=AXIS, in_axes=(None, None, 0), out_axes=(None, 0), devices=devices)


def replicate(tree, devices: list[jax.Device]):
    """The tree with a copy of every array on each device, as the mapped functions take state and data."""
    sharding = _sharding(devices, PartitionSpec())
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(values):
        if isinstance(values, jax.Array) and not values.is_fully_addressable:
            return values
        if jax.dtypes.issubdtype(values.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(values)), impl=jax.random.key_impl(values))
        # Every process has the whole, so nothing is sent; `device_put` would compare the processes' copies.
        values = np.asarray(values)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(place, tree)


def _sharding(devices: list[jax.Device], spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.asarray(devices), (AXIS,)), spec)


def placeholders(state, batches: dict[str, jax.ShapeDtypeStruct], devices: list[jax.Device]):
    """The arguments for lowering the training step, from the shapes of the state and of this process's batches."""
    if _sharding(devices, PartitionSpec()).is_fully_addressable:
        return state, batches
    # With several processes, `pmap` lowers for arrays, not for their shapes.
    state, batches = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), (state, batches))
    return replicate(state, devices), assemble(batches, devices)


def assemble(batches: dict[str, np.ndarray], devices: list[jax.Device]) -> Batch:
    """What `shard` made for this process's devices, joined with the others' into one batch over all `devices`."""
    sharding = _sharding(devices, PartitionSpec(AXIS))
    if sharding.is_fully_addressable:
        return batches
    return {name: jax.make_array_from_process_local_data(sharding, values) for name, values in batches.items()}


def shard(batches: dict[str, np.ndarray], num_devices: int) -> dict[str, np.ndarray]:
    """`(K, B, ...)` arrays of K batches as `(devices, K, B / devices, ...)`."""

    def split(values):
        steps, size = values.shape[:2]
        return values.reshape(steps, num_devices, size // num_devices, *values.shape[2:]).swapaxes(0, 1)

    return {name: split(values) for name, values in batches.items()}


def unshard(tree):
    """`(devices, K, N, ...)` arrays as NumPy's `(K * devices * N, ...)`, in the order before `shard`."""

    def join(values):
        values = np.asarray(values).swapaxes(0, 1)
        return values.reshape(-1, *values.shape[3:])

    return jax.tree.map(join, tree)
