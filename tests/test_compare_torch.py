"""The runs of a comparison in PyTorch against ours: weights and steps; resumed, and refused."""

import contextlib
import functools
import json
import os

import jax
import numpy as np
import pytest
import torch

from jaxnets import (
    compare_entries,
    compare_results,
    compare_runs,
    compare_torch,
    journal,
    loop,
    plan,
    timing,
    torch_weights,
    trained_run,
)
from jaxnets.errors import UserError
from tests.slow import mark_slow
from tests.tiny_net import registered, small_digits
from tests.tiny_torch import named_tiny

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def data_dir(digits_dir):
    with registered(), named_tiny():
        yield str(digits_dir)


@pytest.fixture
def config(data_dir):
    """Two epochs of five steps, whose images are as they are: what both sides compute is then the same."""
    config = small_digits()
    config.data_dir = data_dir
    config.augment.crop_padding = 0
    return config


def changed(config, **fields):
    """A copy with other fields, by their dotted names with `__` for the dot."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


RECIPES = {
    "sgd": {"optimizer__learning_rate": 0.1, "optimizer__weight_decay": 0.05, "label_smoothing": 0.1},
    "sgd, clipped": {
        "optimizer__nesterov": False,
        "optimizer__clip_norm": 0.3,
        "optimizer__weight_decay": 0.05,
        "optimizer__decay_depthwise": False,
        "optimizer__decay_vectors": True,
    },
    "adamw": {"optimizer__name": "adamw", "optimizer__learning_rate": 0.01, "optimizer__weight_decay": 0.5},
    "rmsprop": {"optimizer__name": "rmsprop", "optimizer__learning_rate": 0.01, "optimizer__epsilon": 1e-3},
    "muon": {
        "optimizer__name": "muon",
        "optimizer__learning_rate": 0.02,
        "optimizer__weight_decay": 0.5,
        "optimizer__decay_vectors": True,
    },
    "progressive": {"progressive_sizes": (8, 16)},
}


@pytest.mark.parametrize("recipe", [mark_slow(name) if name in ("adamw", "rmsprop") else name for name in RECIPES])
def test_both_sides_learn_the_same(recipe, config, tmp_path):
    """Where nothing is drawn, the same change of every weight and the same records, but for rounding."""
    config = changed(config, **RECIPES[recipe])
    loop.train(config, tmp_path / "ours")
    compare_torch.train(config, tmp_path / "torch")
    run = trained_run.load_run(tmp_path / "ours", "latest")
    first = plan.compile_and_create_state(plan.make_plan(config)).variables
    theirs = torch_weights.load(run.model, torch.load(tmp_path / "torch" / compare_torch.CHECKPOINT)["net"])
    changes = jax.tree.map(lambda before, after: np.asarray(after) - before, first, run.variables)
    largest = max(np.abs(change).max() for change in jax.tree.leaves(changes))
    assert largest > 0.01
    for path, change in jax.tree_util.tree_leaves_with_path(changes):
        before, after = (functools.reduce(lambda tree, key: tree[key.key], path, tree) for tree in (first, theirs))
        # A scale that the next BatchNorm undoes has a gradient of rounding errors: nothing to compare.
        np.testing.assert_allclose(after - before, change, rtol=1e-2, atol=1e-2 * largest, err_msg=str(path))
    ours, other = (
        {(record["step"], name): value for record in journal.read(tmp_path / side) for name, value in record.items()}
        for side in ("ours", "torch")
    )
    for step in (5, 10):
        for name in ("loss", "eval_loss", "learning_rate"):
            assert other[step, name] == pytest.approx(ours[step, name], rel=1e-4), (step, name)
        assert abs(ours[step, "eval_accuracy"] - other[step, "eval_accuracy"]) <= 1 / 50
    assert ours[10, "num_examples"] == other[10, "num_examples"] == 50
    assert [(span.first, span.last) for span in timing.read(tmp_path / "torch")] == [(0, 5), (5, 10)]


def test_a_run_goes_on_as_if_nothing_had_stopped_it(config, tmp_path, monkeypatch):
    """In the memory format that it has, though another is faster then."""
    monkeypatch.setattr(compare_torch, "fastest", lambda trials: "channels_last")
    config = changed(
        config, augment__crop_padding=2, augment__flip=True, schedule__name="constant", schedule__warmup_epochs=0.0
    )
    compare_torch.train(config, tmp_path / "whole")
    compare_torch.train(changed(config, num_epochs=1), tmp_path / "stopped")
    first = journal.read(tmp_path / "stopped")
    monkeypatch.setattr(compare_torch, "fastest", lambda trials: "NCHW")
    compare_torch.train(config, tmp_path / "stopped")
    assert journal.read(tmp_path / "stopped")[: len(first)] == first

    def lasting(side):
        records = journal.read(tmp_path / side)
        return [{name: value for name, value in r.items() if name != "images_per_second"} for r in records]

    assert lasting("stopped") == lasting("whole") and len(first) == 2


def test_a_finished_run_without_its_last_evaluation_has_to_be_deleted(config, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_torch, "fastest", lambda trials: "NCHW")
    compare_torch.train(config, tmp_path)
    records = tmp_path / journal.FILE
    *others, _ = records.read_text().splitlines(keepends=True)
    for left in ("".join(others), ""):
        records.write_text(left)
        with pytest.raises(UserError, match="has finished, but its last evaluation is no longer in metrics.jsonl; del"):
            compare_torch.train(config, tmp_path)


def test_an_evaluation_that_is_not_finite_ends_a_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_torch, "fastest", lambda trials: "NCHW")
    monkeypatch.setattr(compare_torch, "evaluate", lambda *_: {"eval_loss": float("nan"), "eval_accuracy": 0.1})
    with pytest.raises(UserError, match="PyTorch's evaluation loss became nan in epoch 1"):
        compare_torch.train(config, tmp_path)
    assert not any("eval_accuracy" in record for record in journal.read(tmp_path))


def test_the_fastest_format_is_by_the_epochs_of_each_size(config, monkeypatch):
    """By the fastest step of each: one that was held up tells nothing."""
    config = changed(config, progressive_sizes=(8, 8, 16), num_epochs=3)
    made = plan.make_plan(config)
    times = {
        ("a", 8): [2.0, 9.0, 9.0],
        ("a", 16): [5.0, 5.0, 5.0],
        ("b", 8): [3.0, 3.0, 3.0],
        ("b", 16): [4.0, 4.0, 4.0],
    }
    trials = {name: compare_torch.TorchRun(made, name, None, {}, {}, "NCHW") for name in "ab"}
    monkeypatch.setattr(compare_torch, "time_step", lambda trial, size: times[trial.net, size].pop())
    assert compare_torch.epochs_by_size(made) == {8: 2, 16: 1}
    assert compare_torch.fastest(trials) == "a"  # 2 x 2 + 5 against 2 x 3 + 4


def test_a_run_that_is_longer_is_left_as_it_is(config, tmp_path):
    compare_torch.train(config, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(UserError, match="at step 10, beyond config.num_epochs=1, which ends at 5"):
        compare_torch.train(changed(config, num_epochs=1), tmp_path / "run")
    after = {path: path.read_bytes() for path in before}
    assert {path for path in before if before[path] != after[path]} <= {tmp_path / "run" / ".lock"}


@pytest.mark.parametrize(
    ("backend", "has_cuda", "devices", "says"),
    [
        ("gpu", False, 1, "JAX trains on the GPU, which PyTorch .* cannot use"),
        ("tpu", True, 1, "JAX trains on the TPU, which PyTorch .* cannot use"),
        ("gpu", True, 2, "PyTorch trains on one GPU, JAX on all 2; set CUDA_VISIBLE_DEVICES=0"),
        ("gpu", True, 1, ""),
        ("cpu", True, 4, ""),
    ],
)
def test_both_sides_have_the_same_device(backend, has_cuda, devices, says, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [None] * devices)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    with pytest.raises(UserError, match=says) if says else contextlib.nullcontext():
        compare_torch.check_device()


def test_weights_that_are_not_finite_are_not_saved(config, tmp_path, monkeypatch):
    """Those of a run that is not evaluated after every epoch: the losses come before the last update."""
    config = changed(config, eval_every_epochs=2)
    take, steps = compare_torch.take_step, []

    def spoil(run, *args):
        result = take(run, *args)
        steps.append(run)
        if len(steps) == 5:
            next(run.net.parameters()).data[0] = float("nan")
        return result

    monkeypatch.setattr(compare_torch, "fastest", lambda trials: "NCHW")
    monkeypatch.setattr(compare_torch, "warm_up", lambda trial: None)
    monkeypatch.setattr(compare_torch, "take_step", spoil)
    with pytest.raises(UserError, match="PyTorch's weights are no longer finite at step 5; they were not saved"):
        compare_torch.train(config, tmp_path)
    assert compare_torch.read(tmp_path / compare_torch.CHECKPOINT) is None


def test_a_damaged_checkpoint_is_one_sentence(config, tmp_path):
    compare_torch.train(changed(config, num_epochs=1), tmp_path / "run")
    path = tmp_path / "run" / compare_torch.CHECKPOINT
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"torch.pt cannot be read"):
        compare_torch.train(config, tmp_path / "run")
    for content in ({"format": "NCHW"}, {"format": [], "net": {}, "optimizer": {}, "step": 1}, [1]):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"torch.pt cannot be read \(.*\); delete its folder"):
            compare_torch.read(path)
    path.write_bytes(b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R.")  # 1 GiB of zeros
    with pytest.raises(UserError, match=r"torch.pt cannot be read \(.*\); delete its folder"):
        compare_torch.read(path)
    path.unlink()
    assert compare_torch.read(path) is None


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(config, tmp_path, monkeypatch):
    def fails(saved, path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(UserError, match=r"torch.pt cannot be written: PytorchStreamWriter failed"):
        compare_torch.train(changed(config, num_epochs=1), tmp_path / "run")


def test_a_comparison_has_both_sides(config, tmp_path, monkeypatch, caplog):
    entries = compare_entries.beside_torch([compare_entries.Entry("tiny", config)])
    assert [entry.label for entry in entries] == ["tiny", "tiny (PyTorch)"]
    comparison = compare_runs.run(entries, 1, tmp_path / "out")
    ours, theirs = comparison["nets"]
    assert (ours["framework"], theirs["framework"]) == ("jaxnets", "torch")
    assert ours["parameters"] == theirs["parameters"] and ours["runs"] != theirs["runs"]
    assert abs(ours["results"]["accuracy"]["mean"] - theirs["results"]["accuracy"]["mean"]) <= 1 / 50
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| tiny (PyTorch) |" in text and f"PyTorch {torch.__version__.split('+')[0]}" in text
    (where,) = theirs["runs"][0]["machines"]
    # A package's own version may leave out what its build says of itself: 2.13.0+cu130.
    assert where["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    monkeypatch.setattr(compare_torch, "train", lambda *args: pytest.fail("trained again"))
    assert compare_runs.run(entries, 1, tmp_path / "out")["nets"] == json.loads(json.dumps(comparison["nets"]))
    assert "was trained on" not in caplog.text
    assert compare_results.torch_versions([ours]) is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model__name": "resnet18_cifar"}, "there is no resnet18_cifar in PyTorch here; there are mobilenet_v1"),
        ({"model__dropout": 0.5}, "does not support config.model.dropout"),
        ({"ema_decay": 0.9}, "config.ema_decay"),
        ({"augment__mixup": 0.2}, "config.augment.mixup"),
        ({"optimizer__name": "lion"}, "config.optimizer.name"),
        ({"deterministic": True}, "config.deterministic"),
        ({"sync_batch_norm": False}, "of each of its 4 CPU devices; set config.sync_batch_norm=True"),
        ({"resident": "false"}, "net .PyTorch.: --against=torch: the PyTorch side keeps all images in memory, 0.0 GB"),
    ],
)
def test_what_pytorch_does_not_have_is_refused_before_any_work(fields, says, config, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # which determinism adds to
    entries = compare_entries.beside_torch([compare_entries.Entry("net", changed(config, **fields))])
    with pytest.raises(UserError, match=says):
        compare_runs.run(entries, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_misspelt_field_of_a_net_is_one_sentence(config):
    with config.unlocked():
        config.model.widht = 0.5  # of a configuration of one's own: --models refuses it itself
    with pytest.raises(UserError, match="tiny has no field 'widht'; it has width"):
        compare_torch.check(config)


@pytest.mark.parametrize(
    "path", ["mnv1.py:quick", "mnv2.py:quick", "shufflenet_v2.py:reference", "squeezenet.py", "mnv2.py:tutorial"]
)
def test_the_families_recipes_are_known(path, repository):
    configs = compare_entries.load_configs([f"{repository}/configs/{path}"], [])
    for config in configs.values():
        compare_torch.check(config)
