"""The accuracy on the training images, after training: of the final weights, measured once, on either side."""

import json
import shutil

import numpy as np
import pytest
import torch

from jaxnets import (
    compare_entries,
    compare_page,
    compare_results,
    compare_runs,
    compare_train_accuracy,
    compare_training,
    evaluate,
)
from jaxnets.compare_training import SeedRun
from tests.tiny_net import registered, small_digits
from tests.tiny_torch import named_tiny

pytestmark = pytest.mark.usefixtures("undrawn")

NETS = ("tiny", "tiny (PyTorch)")


@pytest.fixture(scope="module")
def entries(digits_dir):
    config = small_digits()
    config.data_dir = str(digits_dir)
    config.ema_decay = 0.0
    with registered(), named_tiny(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_page, "_chart", lambda *_: "<svg></svg>")
        yield compare_entries.beside_torch([compare_entries.Entry("tiny", config)])


@pytest.fixture(scope="module")
def finished(entries, tmp_path_factory):
    """The folder of a comparison of both sides."""
    out = tmp_path_factory.mktemp("compared") / "out"
    compare_runs.run(entries, 1, out, train_accuracy=True)
    return out


def runs_of(out):
    return {net["label"]: net["runs"][0] for net in json.loads((out / "compare.json").read_text())["nets"]}


def test_it_is_that_of_evaluate_on_the_training_split(finished, entries, capsys):
    workdir = SeedRun(entries[0], 0, finished).workdir
    split = entries[0].config.train_split
    evaluate.main(["evaluate", f"--workdir={workdir}", "--checkpoint=latest", f"--split={split}"])
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert runs_of(finished)["tiny"]["final_train_accuracy"] == expected["eval_accuracy"]
    assert expected["num_examples"] == 160


def test_both_sides_have_it_in_every_file(finished):
    runs = runs_of(finished)
    for label in NETS:
        assert 0 < runs[label]["final_train_accuracy"] < 1
    # Augmentation is drawn differently, so the weights are near and no more.
    ours, theirs = (runs[label]["final_train_accuracy"] for label in NETS)
    assert abs(ours - theirs) < 0.1
    table = (finished / "compare.md").read_text()
    assert "| train (%) | in training (%) |" in table and "- Train: of the same weights as the accuracy" in table
    assert f"{100 * ours:.2f} |" in table
    assert "final_train_accuracy_mean" in (finished / "compare.csv").read_text()
    assert f"{ours:.2%}" in (finished / "compare.html").read_text()


def test_it_is_measured_once(finished, entries, monkeypatch):
    before = runs_of(finished)
    monkeypatch.setattr(compare_train_accuracy, "_evaluate", lambda *_: pytest.fail("evaluated again"))
    monkeypatch.setattr(compare_training.torch_side(), "evaluate_training", lambda *_: pytest.fail("evaluated again"))
    compare_runs.run(entries, 1, finished, train_accuracy=True)
    assert runs_of(finished) == before


def test_finished_runs_get_it_later(finished, entries, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    for file in out.rglob(compare_train_accuracy.FILE):
        file.unlink()
    compare_runs.run(entries, 1, out)
    assert "in training (%)" in (out / "compare.md").read_text()
    assert "| train (%)" not in (out / "compare.md").read_text()
    compare_runs.run(entries, 1, out, train_accuracy=True)
    assert runs_of(out) == runs_of(finished)


def test_runs_without_their_last_checkpoint_have_none(finished, entries, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    for entry in entries:
        (SeedRun(entry, 0, out).workdir / compare_train_accuracy.FILE).unlink()
    shutil.rmtree(SeedRun(entries[0], 0, out).workdir / "checkpoints")
    (SeedRun(entries[1], 0, out).workdir / "torch.pt").unlink()
    found = compare_runs.run(entries, 1, out, train_accuracy=True)
    assert [net["runs"][0]["final_train_accuracy"] for net in found["nets"]] == [None, None]
    assert [net["failed"] for net in found["nets"]] == [[], []]
    assert compare_results.with_spread(found["nets"][0]["results"]["final_train_accuracy"], 1) == "-"


def test_weights_of_an_earlier_epoch_are_not_evaluated(finished, entries, tmp_path):
    """A kill may come between the last evaluation and PyTorch's checkpoint after it."""
    out = shutil.copytree(finished, tmp_path / "out")
    directory = SeedRun(entries[1], 0, out).workdir
    (directory / compare_train_accuracy.FILE).unlink()
    saved = torch.load(directory / "torch.pt")
    torch.save(saved | {"step": saved["step"] - 5}, directory / "torch.pt")
    _, theirs = compare_runs.run(entries, 1, out, train_accuracy=True)["nets"]
    assert theirs["runs"][0]["final_train_accuracy"] is None


def test_an_evaluation_that_fails_leaves_the_rest(finished, entries, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    (SeedRun(entries[0], 0, out).workdir / compare_train_accuracy.FILE).unlink()

    def fails(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(compare_train_accuracy, "_evaluate", fails)
    ours, theirs = compare_runs.run(entries, 1, out, train_accuracy=True)["nets"]
    assert ours["failed"] == ["seed 0, accuracy on its training images: no room"] and len(ours["runs"]) == 1
    assert theirs["failed"] == [] and theirs["runs"][0]["final_train_accuracy"] > 0


@pytest.mark.parametrize("content", ["", "5", "[]", '{"step": 10}', '{"step": 10, "eval_loss": 2.0, "accuracy": "x"}'])
def test_what_is_not_of_these_weights_does_not_count(content, tmp_path):
    last = {"step": 10, "eval_loss": 2.0, "eval_accuracy": 0.5}
    (tmp_path / compare_train_accuracy.FILE).write_text(content)
    assert compare_train_accuracy.read(tmp_path, last) is None
    (tmp_path / compare_train_accuracy.FILE).write_text('{"step": 10, "eval_loss": 2.0, "accuracy": 0.25}')
    assert compare_train_accuracy.read(tmp_path, last) == 0.25
    assert compare_train_accuracy.read(tmp_path, last | {"eval_loss": np.nextafter(2.0, 3.0)}) is None
