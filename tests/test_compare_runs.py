"""Runs compared, from their configurations to the files written: resumed, refused, and with one that fails."""

import csv
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxnets
from jaxnets import (
    announce,
    compare_entries,
    compare_page,
    compare_runs,
    compare_training,
    journal,
    latency,
    loop,
    machine,
    plain_files,
    torch_weights,
    workdir,
)
from jaxnets.compare_training import SeedRun, runs_of
from jaxnets.errors import UserError
from tests.slow import slow_after
from tests.tiny_net import registered, small_digits

pytestmark = pytest.mark.usefixtures("undrawn")

MODELS = ("tiny", "tiny:width=0.5")


@pytest.fixture(scope="module")
def configs(digits_dir):
    """The digits' configuration, made small; pages have their texts and tables, and no charts."""
    config = small_digits()
    config.data_dir = str(digits_dir)
    config.eval_split = "test[:48]"
    config.compilation_cache = False  # the suite's own is set in conftest.py
    with registered(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_page, "_chart", lambda *_: "<svg></svg>")
        yield {"digits": config}


@pytest.fixture
def trained(monkeypatch):
    """The runs that are started, in their order, as (net's folder, seed's folder)."""
    started, train = [], loop.train

    def note(config, directory):
        started.append((directory.parent.name, directory.name))
        return train(config, directory)

    monkeypatch.setattr(loop, "train", note)
    return started


@pytest.fixture(scope="module")
def finished(configs, tmp_path_factory):
    """The folder of a comparison that was run to its end."""
    out = tmp_path_factory.mktemp("finished") / "comparison"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "SECONDS", 0.0)
        compare_runs.run(compare_entries.make_entries(configs, MODELS), 2, out, latency_batch=32)
    return out


def test_every_net_is_trained_with_every_seed_and_timed(finished):
    out = finished
    comparison = json.loads((out / "compare.json").read_text())
    assert [net["label"] for net in comparison["nets"]] == list(MODELS)
    for net in comparison["nets"]:
        assert [run["seed"] for run in net["runs"]] == [0, 1]
        for run in net["runs"]:
            workdir = out / "runs" / net["label"].replace(":", "_") / f"seed{run['seed']}"
            last = journal.read(workdir)[-1]
            assert (last["step"], last["eval_accuracy"]) == (10, run["accuracy"])
            assert run["train_images"] == 320 and len(run["curve"]) == 2
        assert net["results"]["accuracy"]["n"] == 2
        assert net["latency"]["image_size"] == 16 and net["latency"]["one"]["ms"] > 0
    runs = [run["accuracy"] for net in comparison["nets"] for run in net["runs"]]
    assert len(set(runs)) > 1  # they are runs of their own


def test_the_files_agree(finished):
    out = finished
    comparison = json.loads((out / "compare.json").read_text())
    rows = list(csv.DictReader((out / "compare.csv").open()))
    assert [float(row["accuracy_mean"]) for row in rows] == [
        net["results"]["accuracy"]["mean"] for net in comparison["nets"]
    ]
    written = (out / "compare.md").read_text()
    assert all(f"| {net['label']} |" in written for net in comparison["nets"])
    page = (out / "compare.html").read_text().replace("<wbr>", "")
    for net in comparison["nets"]:
        assert f"{net['parameters']:,}" in page and net["label"] in page


def test_what_is_finished_is_not_run_or_timed_again(finished, configs, trained, monkeypatch):
    out = finished
    before = json.loads((out / "compare.json").read_text())
    monkeypatch.setattr(latency, "measure", lambda *args, **kwargs: pytest.fail("timed again"))
    again = compare_runs.run(compare_entries.make_entries(configs, MODELS), 2, out, latency_batch=32)
    assert trained == []
    assert again["nets"] == before["nets"]


def test_more_seeds_keep_what_is_there(finished, configs, trained, tmp_path):
    out = shutil.copytree(finished, tmp_path / "copy")
    first = {name: config.copy_and_resolve_references() for name, config in configs.items()}
    next(iter(first.values())).seed = 1
    found = compare_runs.run(compare_entries.make_entries(first, MODELS[:1]), 2, out)
    assert trained == [("tiny", "seed2")]
    assert [run["seed"] for run in found["nets"][0]["runs"]] == [1, 2]


def test_an_interrupted_comparison_goes_on_where_it_was(configs, trained, tmp_path, monkeypatch):
    """The second of two runs gets SIGTERM in its first epoch; the same call finishes it, and runs nothing twice."""
    entries = compare_entries.make_entries(configs, MODELS)
    write, runs = journal.Journal.write, []

    def interrupt(self, record):
        write(self, record)
        if len(trained) == 2 and not runs:
            runs.append(record["step"])
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(journal.Journal, "write", interrupt)
    with pytest.raises(SystemExit) as caught:
        compare_runs.run(entries, 1, tmp_path)
    assert caught.value.code == 128 + signal.SIGTERM
    between = json.loads((tmp_path / "compare.json").read_text())  # written after the first run
    assert [len(net["runs"]) for net in between["nets"]] == [1, 0]
    kept = journal.read(tmp_path / "runs" / "tiny_width=0.5" / "seed0")
    trained.clear()
    found = compare_runs.run(entries, 1, tmp_path)
    assert trained == [("tiny_width=0.5", "seed0")]
    assert journal.read(tmp_path / "runs" / "tiny_width=0.5" / "seed0")[: len(kept)] == kept  # gone on, not begun anew
    assert [len(net["runs"]) for net in found["nets"]] == [1, 1]
    assert found["nets"][0]["runs"] == between["nets"][0]["runs"]


@pytest.mark.parametrize("error", slow_after(3, [UserError, jax.errors.JaxRuntimeError, TypeError, MemoryError]))
def test_a_run_that_fails_does_not_keep_the_others(error, configs, tmp_path, monkeypatch):
    train = loop.train

    def fail(config, directory):
        if config.model.width == 0.5:
            raise error("the loss became nan" + (error is not UserError) * "\nand more")
        return train(config, directory)

    monkeypatch.setattr(loop, "train", fail)
    found = compare_runs.run(compare_entries.make_entries(configs, MODELS[::-1]), 1, tmp_path)
    assert [net["failed"] for net in found["nets"]] == [["seed 0: the loss became nan"], []]
    assert [len(net["runs"]) for net in found["nets"]] == [0, 1]
    assert "the loss became nan" in (tmp_path / "compare.html").read_text()
    with pytest.raises(
        UserError, match="no run was finished; the first failure: tiny:width=0.5, seed 0: the loss became nan"
    ):
        compare_runs.run(compare_entries.make_entries(configs, MODELS[1:]), 1, tmp_path)


@pytest.mark.parametrize("train_accuracy", [False, True])
def test_a_run_whose_records_are_damaged_meanwhile_does_not_keep_the_others(
    configs, tmp_path, monkeypatch, train_accuracy
):
    entries, train = compare_entries.make_entries(configs, MODELS), loop.train
    first = SeedRun(entries[0], 0, tmp_path).workdir / "metrics.jsonl"

    def damage(config, directory):
        train(config, directory)
        first.write_text("5\n")

    monkeypatch.setattr(loop, "train", damage)
    found = compare_runs.run(entries, 1, tmp_path, train_accuracy=train_accuracy)
    (failed,), none = (net["failed"] for net in found["nets"])
    assert failed.endswith(f": {first} has lines that are not records of a run") and none == []
    assert [len(net["runs"]) for net in found["nets"]] == [0, 1]


def test_a_table_that_cannot_be_written_meanwhile_stops_no_run(configs, trained, monkeypatch, tmp_path, caplog):
    entries, asked = compare_entries.make_entries(configs, MODELS), []
    monkeypatch.setattr(SeedRun, "is_finished", lambda _: False)
    monkeypatch.setattr(loop, "train", lambda config, directory: trained.append(directory))

    def write(failed):
        asked.append(failed)
        raise OSError("No space left on device")

    compare_training.train_all(entries, 2, tmp_path, write)
    assert len(trained) == len(asked) == 2 * len(entries)
    assert "the table so far was not written: No space left on device" in caplog.text


def test_a_rate_is_warned_of_before_training_and_not_again_where_it_is_done(finished, configs, monkeypatch):
    asked = []
    monkeypatch.setattr(announce, "warn_of_high_rate", asked.append)
    entry, *_ = compare_entries.make_entries(configs, MODELS)
    compare_runs.Net.of(entry, [run.workdir for run in runs_of(entry, 2, finished)])
    assert asked == []
    compare_runs.Net.of(entry)
    assert [planned.config.model.name for planned in asked] == [entry.config.model.name]


def test_runs_of_another_configuration_are_refused_before_any_work(finished, configs, trained):
    out = finished
    changed = {name: config.copy_and_resolve_references() for name, config in configs.items()}
    next(iter(changed.values())).batch_size = 16
    with pytest.raises(UserError, match="batch_size was 32, is 16"):
        compare_runs.run(compare_entries.make_entries(changed, ["tiny:dropout=0.1", "tiny"]), 1, out)
    assert trained == [] and not (out / "runs" / "tiny_dropout=0.1").exists()


@pytest.mark.parametrize(("field", "value"), [("num_epochs", 3), ("num_epochs", 1), ("eval_every_epochs", 2)])
def test_runs_of_another_length_are_refused(field, value, finished, configs, trained):
    """Gone on with, a run would be none that was made in one go, and stand beside such."""
    out = finished
    changed = {name: config.copy_and_resolve_references() for name, config in configs.items()}
    next(iter(changed.values()))[field] = value
    with pytest.raises(UserError, match=rf"tiny.seed0 holds a run with config.{field}="):
        compare_runs.run(compare_entries.make_entries(changed, MODELS), 2, out)
    assert trained == []


def test_nets_on_different_images_are_refused(configs, tmp_path):
    (config,) = configs.values()
    other = config.copy_and_resolve_references()
    other.dataset = "cifar10"
    entries = compare_entries.make_entries({"one": config, "other": other}, ["tiny"])
    with pytest.raises(UserError, match="config.dataset is 'digits' for tiny .one. and 'cifar10' for tiny .other."):
        compare_runs.run(entries, 1, tmp_path)
    for field in ("train_split", "data_dir"):
        other = config.copy_and_resolve_references()
        other[field] = "elsewhere"
        entries = compare_entries.make_entries({"one": config, "other": other}, ["tiny"])
        with pytest.raises(UserError, match=f"config.{field} is .* for tiny .one. and 'elsewhere' for tiny .other."):
            compare_runs.run(entries, 1, tmp_path)


@pytest.mark.parametrize(
    ("fields", "models", "says"),
    [
        ({"train_split": "nonsense"}, MODELS, "tiny: split 'nonsense' of digits does not exist"),
        ({"batch_size": 100_000_000}, MODELS, "tiny: config.batch_size=100000000 must be at most the 160 examples"),
        ({"init_from": "missing.pth"}, MODELS, "tiny: config.init_from='missing.pth': there is no such file"),
        ({}, ("tiny", "tiny:num_classes=5"), "tiny:num_classes=5: config.model.num_classes=5 is less than the 10"),
        ({}, ("tiny", "vgg16_bn_cifar:width=0.1"), "vgg16_bn_cifar:width=0.1: .* too small"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_training(fields, models, says, configs, trained, tmp_path):
    config = configs["digits"].copy_and_resolve_references()
    config.update(fields)
    with pytest.raises(UserError, match=f"^{says}"):
        compare_runs.run(compare_entries.make_entries({"digits": config}, models), 1, tmp_path / "out")
    assert trained == [] and not (tmp_path / "out").exists()


def test_finished_runs_on_other_images_are_refused_or_remarked_on(finished, configs, trained, tmp_path, caplog):
    out = tmp_path / "comparison"
    shutil.copytree(finished, out)
    kept = out / "runs" / "tiny" / "seed1" / workdir.DATA
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"train_images": 161}))
    entries = compare_entries.make_entries(configs, MODELS)
    with pytest.raises(
        UserError, match="tiny: the run in .*seed1 was trained on other data: 161 training and 48 evaluation images"
    ):
        compare_runs.run(entries, 2, out)
    shutil.copytree(configs["digits"].data_dir, tmp_path / "moved")
    moved = configs["digits"].copy_and_resolve_references()
    moved.data_dir = str(tmp_path / "moved")
    compare_runs.run(compare_entries.make_entries({"digits": moved}, ["tiny"]), 1, out)
    before, now = configs["digits"].data_dir, tmp_path / "moved"
    assert f"seed0 was trained on {before}, and the data are now in {now}: " in caplog.text
    assert not trained


def test_a_run_that_has_begun_needs_its_first_weights_no_longer(finished, configs, trained, tmp_path):
    out = shutil.copytree(finished, tmp_path / "copy")
    config = configs["digits"].copy_and_resolve_references()
    config.init_from = "gone.pth"
    for path in out.glob("runs/*/*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"init_from": config.init_from}))
    shutil.rmtree(out / "runs" / "tiny" / "seed1" / "checkpoints")
    compare_runs.run(compare_entries.make_entries({"digits": config}, MODELS), 2, out)
    assert trained == []


def test_names_in_latin_1_are_written_with_a_replacement(finished, configs, tmp_path):
    out = shutil.copytree(finished, tmp_path / "caf\udce9")
    entries = compare_entries.make_entries(configs, MODELS)
    comparison = compare_runs.run(entries, 2, out, command=f"compare --out={out}", note="th\udce9")
    assert "th\ufffd" in (out / "compare.md").read_text() and "caf\ufffd" in (out / "compare.html").read_text()
    compare_runs.write_files(comparison | {"dataset": "folder:s\udce9"}, out)
    assert "2 nets on folder:s\ufffd" in (out / "compare.html").read_text()


def test_a_net_that_cannot_be_timed_does_not_keep_the_others(finished, configs, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "copy")

    def measure(model, shape, **arguments):
        if model.width == 1.0:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")
        return {"ms": 1.0, "low_ms": 1.0, "high_ms": 1.0, "calls": 1}

    monkeypatch.setattr(latency, "measure", measure)
    entries = compare_entries.make_entries(configs, MODELS)
    found = compare_runs.run(entries, 2, out, latency_batch=7)
    assert [net["failed"] for net in found["nets"]] == [["latency: RESOURCE_EXHAUSTED: out of memory"], []]
    assert found["nets"][0]["latency"] is None and found["nets"][1]["latency"]["batch_size"] == 7
    assert all(net["results"]["accuracy"]["n"] == 2 for net in found["nets"])
    # Of another batch than is asked for, or where none is, nothing is shown.
    assert [net["latency"] for net in compare_runs.run(entries, 2, out)["nets"]] == [None, None]


NO_TABLES = [
    "{}",
    "[1]",
    '{"nets": [{"label": 5, "runs": [{"seed": 0}]}]}',
    '{"nets": [{"label": "a", "runs": [{"seed": []}]}]}',
]


@pytest.mark.parametrize(("name", "text"), [("compare.csv", "mine"), *(("compare.json", text) for text in NO_TABLES)])
def test_a_file_that_is_no_table_of_ours_is_not_overwritten(name, text, configs, trained, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} exists, but compare.json holds no jaxnets.compare table"):
        compare_runs.run(compare_entries.make_entries(configs, MODELS), 1, tmp_path)
    assert trained == [] and (tmp_path / name).read_text() == text


def test_a_table_of_fewer_nets_says_so(finished, configs, tmp_path, caplog):
    out = shutil.copytree(finished, tmp_path / "copy")
    with caplog.at_level("INFO"):
        compare_runs.run(compare_entries.make_entries(configs, MODELS[:1]), 2, out)
        compare_runs.run(compare_entries.make_entries(configs, MODELS[:1]), 1, out)
    assert caplog.text.count("no longer shows") == 2 and not list(out.glob("compare.1.*"))
    assert "no longer shows tiny:width=0.5; their runs are kept" in caplog.text
    assert "no longer shows tiny, seed 1; their runs are kept" in caplog.text


def test_a_table_whose_runs_are_gone_is_kept(finished, configs, tmp_path, caplog):
    out = shutil.copytree(finished, tmp_path / "copy")
    before = {path.suffix: path.read_bytes() for path in out.glob("compare.*")}
    shutil.rmtree(out / "runs" / "tiny" / "seed1")
    compare_runs.run(compare_entries.make_entries(configs, MODELS), 1, out)
    assert {path.suffix: path.read_bytes() for path in out.glob("compare.1.*")} == before and len(before) == 4
    assert "compare.json was made from runs that no longer exist: it is kept as compare.1.json, com" in caplog.text
    assert len(json.loads((out / "compare.json").read_text())["nets"][0]["runs"]) == 1


def test_a_run_whose_last_checkpoint_was_not_saved_is_finished_by_the_same_call(
    finished, configs, tmp_path, monkeypatch
):
    started = []
    monkeypatch.setattr(loop, "train", lambda config, directory: started.append(directory.name))
    out = shutil.copytree(finished, tmp_path / "copy")
    checkpoints = out / "runs" / "tiny" / "seed0" / "checkpoints"
    shutil.rmtree(checkpoints / "5", ignore_errors=True)
    (checkpoints / "10").rename(checkpoints / "5")
    shutil.rmtree(out / "runs" / "tiny" / "seed1" / "checkpoints")  # to make room: nothing is trained again for that
    entries = compare_entries.make_entries(configs, MODELS[:1])
    assert [run.is_finished() for run in runs_of(entries[0], 3, out)] == [False, True, False]
    compare_runs.run(entries, 2, out)
    assert started == ["seed0"]


def test_first_weights_that_do_not_fit_a_net_are_refused_before_training(configs, trained, tmp_path):
    config = configs["digits"].copy_and_resolve_references()
    config.init_from = str(tmp_path / "weights.safetensors")
    model = jaxnets.create_model("tiny", num_classes=10)
    variables = model.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32), train=False)
    save_file(torch_weights.export(model, variables), config.init_from)
    with pytest.raises(UserError, match="^mobilenet_v2_mini: config.init_from=.* does not fit MobileNetV2"):
        compare_runs.run(
            compare_entries.make_entries({"digits": config}, ["tiny", "mobilenet_v2_mini"]), 1, tmp_path / "out"
        )
    assert trained == [] and not (tmp_path / "out").exists()


def test_damaged_records_of_any_seed_are_refused_before_training(finished, configs, trained, tmp_path):
    out = shutil.copytree(finished, tmp_path / "copy")
    entries = compare_entries.make_entries(configs, MODELS)
    damaged = SeedRun(entries[1], 1, out).workdir / "metrics.jsonl"
    damaged.write_text("5\n")
    with pytest.raises(UserError, match=re.escape(f"{damaged} has lines that are not records")):
        compare_runs.run(entries, 3, out)
    assert trained == []


def test_a_comparison_is_made_by_one_command_at_a_time(configs, trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with plain_files.locked(out / compare_runs.LOCK, "it", "comparison"), pytest.raises(UserError) as error:
        compare_runs.run(compare_entries.make_entries(configs, MODELS), 1, out)
    assert str(error.value) == f"--out={out} is in use by another comparison; choose another or wait"
    assert trained == [] and [path.name for path in out.iterdir()] == [compare_runs.LOCK]


def test_a_last_seed_that_cannot_be_is_refused_before_training(configs, trained, tmp_path):
    entries = compare_entries.make_entries(configs, MODELS)
    for entry in entries:
        entry.config.seed = 2**32 - 1
    with pytest.raises(UserError, match="config.seed"):
        compare_runs.run(entries, 2, tmp_path / "out")
    assert trained == [] and not (tmp_path / "out").exists()


def test_a_size_that_cannot_be_timed_is_refused_before_training(configs, trained, tmp_path):
    entries = compare_entries.make_entries(configs, ["tiny", "mobilenet_v1_cifar:width=0.25"])
    with pytest.raises(UserError, match="image_size"):
        compare_runs.run(entries, 1, tmp_path / "out", latency_size=1 << 20, latency_batch=2)
    assert trained == [] and not (tmp_path / "out").exists()


def test_where_it_was_trained_stays_with_a_run(finished, configs, monkeypatch):
    """Also where the table is written again on another machine."""
    out = finished
    here = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda: here | {"device": "another machine"})
    compare_runs.run(compare_entries.make_entries(configs, MODELS), 2, out)
    written = (out / "compare.md").read_text()
    assert "another machine" not in written and f"Trained on: {machine.sentence(here)} (from 20" in written
