"""The steps on one and on four devices, against plain sums, and against themselves in other groupings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets import augment, optim, state, step
from tests.tiny_net import TinyNet

SIDE, CLASSES, COUNT, BATCH = 8, 7, 40, 16
MOMENTS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
KEY = jax.random.key(3)
rng = np.random.default_rng(0)
DATA = {
    "image": rng.integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8),
    "label": rng.integers(0, CLASSES, COUNT).astype(np.int32),
}
INDEX = {"index": rng.integers(0, COUNT, (6, BATCH)).astype(np.int32)}


def start(ema=False, **fields):
    model = TinyNet(num_classes=CLASSES, **fields)
    optimizer = optim.make_optimizer("sgd", optax.constant_schedule(0.1), weight_decay=1e-3)
    create = jax.jit(partial(state.create, model=model, optimizer=optimizer, image_size=SIDE, ema=ema))
    return model, optimizer, create(jax.random.key(0))


def one_step(model, optimizer, axis_name=None, **fields):
    return partial(
        step.train_step, model=model, optimizer=optimizer, augmentation=MOMENTS, axis_name=axis_name, **fields
    )


def run_mapped(num_devices, steps_a_call, streamed=False, bn_axis_name=step.AXIS, **fields):
    """Six steps in calls of some: the per-step metrics and the final state."""
    devices = jax.devices()[:num_devices]
    model, optimizer, current = start(bn_axis_name=bn_axis_name)
    call = step.pmap_train(one_step(model, optimizer, step.AXIS, **fields), devices)
    current, examples = step.replicate(current, devices), step.replicate({} if streamed else DATA, devices)
    losses, correct = [], []
    for first in range(0, 6, steps_a_call):
        batches = {"index": INDEX["index"][first : first + steps_a_call]}
        if streamed:
            batches = {name: values[batches["index"]] for name, values in DATA.items()}
        current, metrics = call(current, examples, step.shard(batches, num_devices), KEY)
        losses.append(np.asarray(metrics.loss))
        correct.append(np.asarray(metrics.correct))
    return np.concatenate(losses), np.concatenate(correct), jax.device_get(current)


@pytest.fixture(scope="module")
def on_one_device():
    return run_mapped(1, 3)


def test_mixing_draws_what_augmentation_does_not(monkeypatch):
    monkeypatch.setattr(step, "mix", lambda key, image, other: (jax.random.key_data(key), 0.0))
    key = jax.random.key(5)
    mixes_by, *_ = step.mix_batch(key[None], jnp.zeros((1, 2, 2, 3)), jnp.zeros(1), {})
    augments_by = jax.random.key_data(jax.random.split(key, 3))
    assert not np.any(np.all(np.asarray(augments_by) == np.asarray(mixes_by), axis=1))


def test_four_devices_with_shared_statistics_equal_one(on_one_device):
    losses, correct, final = run_mapped(4, 3)
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-5)
    np.testing.assert_array_equal(correct, on_one_device[1])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), final, on_one_device[2])


def test_statistics_of_each_device_make_another_net(on_one_device):
    losses, _, final = run_mapped(4, 3, bn_axis_name=None)
    assert abs(losses[-1] - on_one_device[0][-1]) > 1e-4
    variances = [
        [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(s.batch_stats) if path[-1].key == "var"]
        for s in (final, on_one_device[2])
    ]
    assert all(np.abs(one / other - 1).max() > 1e-3 for one, other in zip(*variances))


def test_streamed_batches_equal_resident_ones(on_one_device):
    losses, _, final = run_mapped(1, 3, streamed=True)
    np.testing.assert_array_equal(losses, on_one_device[0])
    jax.tree.map(np.testing.assert_array_equal, final.params, on_one_device[2].params)


@pytest.mark.parametrize("steps_a_call", [1, 2])
def test_the_grouping_of_steps_into_calls_changes_no_bit(on_one_device, steps_a_call):
    jax.tree.map(np.testing.assert_array_equal, run_mapped(1, steps_a_call), on_one_device)


def test_a_step_under_plain_jit_equals_the_mapped_one(on_one_device):
    model, optimizer, current = start()
    batch = step.gather(DATA, {"index": INDEX["index"][0]})
    _, metrics = jax.jit(one_step(model, optimizer))(current, batch, KEY)
    np.testing.assert_allclose(metrics.loss, on_one_device[0][0], rtol=1e-6)


def test_the_gradient_is_the_derivative_of_the_loss():
    """With sgd and nothing else, the first update is minus the rate times the loss's numerical derivative."""
    model, _, current = start()
    optimizer = optim.make_optimizer("sgd", optax.constant_schedule(1.0), momentum=0.0)
    current = current.replace(opt_state=optimizer.init(current.params))
    batch = step.gather(DATA, {"index": INDEX["index"][0]})
    call = jax.jit(one_step(model, optimizer, label_smoothing=0.1))
    after, _ = call(current, batch, KEY)
    direction = jax.tree.map(lambda old, new: old - new, current.params, after.params)
    norm = optax.tree.norm(direction)

    def loss_at(distance):
        moved = jax.tree.map(lambda p, d: p + distance * d / norm, current.params, direction)
        return call(current.replace(params=moved), batch, KEY)[1].loss

    assert (loss_at(1e-2) - loss_at(-1e-2)) / 2e-2 == pytest.approx(float(norm), rel=2e-2)


def test_the_average_follows_the_weights():
    model, optimizer, current = start(ema=True)
    before = jax.device_get(current)
    batch = step.gather(DATA, {"index": INDEX["index"][0]})
    after, _ = jax.jit(one_step(model, optimizer, ema_decay=0.9))(current, batch, KEY)
    rate = 2 / 11  # (1 + 1) / (10 + 1), below the decay
    expected = jax.tree.map(lambda old, new: rate * old + (1 - rate) * new, before.variables, after.variables)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), after.ema, expected)


def test_mixed_images_have_mixed_targets():
    """The loss of a mixed batch is the cross-entropy against targets that have the shares of both labels."""
    model, optimizer, current = start()
    batch = step.gather(DATA, {"index": INDEX["index"][0]})
    call = jax.jit(one_step(model, optimizer, mixing={"mixup": 1.0}))
    _, metrics = call(current, batch, KEY)

    keys, _ = jax.random.split(jax.random.fold_in(KEY, 0))
    keys = jax.vmap(lambda i: jax.random.fold_in(keys, i))(jnp.arange(BATCH))
    own = jax.jit(jax.vmap(partial(augment.augment, **MOMENTS)))(keys, batch["image"])
    mix = jax.jit(partial(step.mix_batch, mixing={"mixup": 1.0}))
    images, others, shares = mix(keys, own, batch["label"])
    np.testing.assert_array_equal(others, [batch["label"][i - 1] for i in range(BATCH)])
    for i in range(BATCH):
        np.testing.assert_allclose(images[i], shares[i] * own[i] + (1 - shares[i]) * own[i - 1], atol=1e-5)
    targets = shares[:, None] * jax.nn.one_hot(batch["label"], CLASSES)
    targets += (1 - shares[:, None]) * jax.nn.one_hot(others, CLASSES)
    apply = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    logits, _ = apply(current.variables, images, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(metrics.loss, optax.softmax_cross_entropy(logits, targets).mean(), rtol=1e-5)
    assert metrics.correct == (logits.argmax(-1) == targets.argmax(-1)).sum()


def test_mixing_is_of_the_seed_and_the_step():
    model, optimizer, current = start()
    batch = step.gather(DATA, {"index": INDEX["index"][0]})
    call = jax.jit(one_step(model, optimizer, mixing={"mixup": 1.0, "cutmix": 1.0}))
    losses = [float(call(current.replace(step=jnp.int32(at)), batch, KEY)[1].loss) for at in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("num_devices", [1, 4])
def test_evaluation_sums_the_unmasked_examples(num_devices):
    model, _, current = start()
    devices = jax.devices()[:num_devices]
    call = step.pmap_eval(partial(step.eval_step, model=model, axis_name=step.AXIS, **MOMENTS), devices)
    index = np.zeros((3, BATCH), np.int32)
    index.flat[:COUNT] = np.arange(COUNT)
    mask = (np.arange(3 * BATCH) < COUNT).reshape(3, BATCH)
    batches = step.shard({"index": index, "mask": mask}, num_devices)
    of_batches, _ = call(step.replicate(current.variables, devices), step.replicate(DATA, devices), batches)
    totals = jax.tree.map(lambda values: np.asarray(values).sum(0), of_batches)

    logits = np.asarray(
        jax.jit(model.apply)(current.variables, augment.normalize(DATA["image"], **MOMENTS)), np.float64
    )
    labels, best = DATA["label"], np.argsort(-logits, -1)
    hit = best[:, 0] == labels
    log_sum = np.log(np.exp(logits).sum(-1))
    assert totals.count == COUNT and totals.correct == hit.sum()
    assert totals.correct_top5 == (best[:, :5] == labels[:, None]).any(-1).sum() > totals.correct
    np.testing.assert_allclose(totals.loss, (log_sum - logits[np.arange(COUNT), labels]).sum(), rtol=1e-5)
    np.testing.assert_array_equal(totals.class_count, np.bincount(labels, minlength=CLASSES))
    np.testing.assert_array_equal(totals.class_correct, np.bincount(labels[hit], minlength=CLASSES))


def test_label_smoothing_is_pytorchs():
    torch = pytest.importorskip("torch")

    logits = rng.normal(size=(5, CLASSES)).astype(np.float32)
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(DATA["label"][:5]).long(), label_smoothing=0.1, reduction="none"
    )
    np.testing.assert_allclose(step.cross_entropy(logits, DATA["label"][:5], 0.1), theirs.numpy(), rtol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_state():
    model, optimizer, current = start(dtype=jnp.bfloat16)
    after, metrics = jax.jit(one_step(model, optimizer))(current, step.gather(DATA, {"index": INDEX["index"][0]}), KEY)
    assert metrics.loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(after.variables)} == {np.dtype("float32")}


def test_shard_gives_every_device_a_slice_of_every_batch():
    batches = {"index": np.arange(24).reshape(2, 12)}
    np.testing.assert_array_equal(
        step.shard(batches, 3)["index"],
        [[[0, 1, 2, 3], [12, 13, 14, 15]], [[4, 5, 6, 7], [16, 17, 18, 19]], [[8, 9, 10, 11], [20, 21, 22, 23]]],
    )


def test_unshard_brings_back_the_order_before_shard():
    values = np.arange(48).reshape(2, 12, 2)
    np.testing.assert_array_equal(step.unshard(step.shard({"v": values}, 3))["v"], values.reshape(24, 2))
