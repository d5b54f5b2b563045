"""Comparisons from the nets named to the files written: resumed, refused, and with a run that fails."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal

import jax
import pytest

from jaxnets import compare, compare_entries, config_file, journal, latency, loop, models
from jaxnets.errors import UserError
from tests.tiny_net import TinyNet

SMALL = [
    "--config.train_split=train[:160]",
    "--config.eval_split=test[:48]",
    "--config.image_size=16",
    "--config.augment.crop_padding=1",
    "--config.batch_size=32",
    "--config.eval_batch_size=16",
    "--config.num_epochs=2",
    "--config.num_workers=0",
    "--config.compilation_cache=False",  # the suite's own is set in conftest.py
]
MODELS = ("tiny", "tiny:width=0.5")


@pytest.fixture(scope="module")
def arguments(repository, tmp_path_factory):
    """What is given to the command beside --models and --out."""
    models.MODELS["tiny"] = TinyNet
    data_dir = tmp_path_factory.mktemp("tfds")
    yield [f"--config={repository}/configs/digits.py", f"--config.data_dir={data_dir}", *SMALL]
    del models.MODELS["tiny"]


@pytest.fixture(scope="module")
def configs(arguments):
    return compare.load_configs([arguments[0].removeprefix("--config=")], arguments[1:], MODELS)


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
def finished(arguments, tmp_path_factory):
    """The command run to its end: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "comparison"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(latency, "SECONDS", 0.0)
        compare.main(["compare", f"--out={out}", f"--models={','.join(MODELS)}", "--seeds=2", *arguments])
    return out, printed.getvalue()


def test_every_net_is_trained_with_every_seed_and_timed(finished):
    out, printed = finished
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
    result = json.loads(printed.splitlines()[-1])
    assert result == {"page": str(out / "compare.html"), "runs": 4, "failed": []}
    assert printed.splitlines()[0].startswith("| net | parameters |")


def test_the_files_agree(finished):
    out, printed = finished
    comparison = json.loads((out / "compare.json").read_text())
    rows = list(csv.DictReader((out / "compare.csv").open()))
    assert [float(row["accuracy_mean"]) for row in rows] == [
        net["results"]["accuracy"]["mean"] for net in comparison["nets"]
    ]
    assert "\n".join(printed.splitlines()[:-1]) in (out / "compare.md").read_text()
    page = (out / "compare.html").read_text()
    for net in comparison["nets"]:
        assert f"{net['parameters']:,}" in page and net["label"] in page


def test_what_is_finished_is_not_run_or_timed_again(finished, configs, trained, monkeypatch):
    out, _ = finished
    before = json.loads((out / "compare.json").read_text())
    monkeypatch.setattr(latency, "measure", lambda *args, **kwargs: pytest.fail("timed again"))
    again = compare.run(compare_entries.make_entries(configs, MODELS), 2, out, latency_batch=32)
    assert trained == []
    assert again["nets"] == before["nets"]


def test_more_seeds_keep_what_is_there(finished, configs, trained, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "copy")
    first = {name: config.copy_and_resolve_references() for name, config in configs.items()}
    next(iter(first.values())).seed = 1
    found = compare.run(compare_entries.make_entries(first, MODELS[:1]), 2, out)
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
        compare.run(entries, 1, tmp_path)
    assert caught.value.code == 128 + signal.SIGTERM
    between = json.loads((tmp_path / "compare.json").read_text())  # written after the first run
    assert [len(net["runs"]) for net in between["nets"]] == [1, 0]
    kept = journal.read(tmp_path / "runs" / "tiny_width=0.5" / "seed0")
    trained.clear()
    found = compare.run(entries, 1, tmp_path)
    assert trained == [("tiny_width=0.5", "seed0")]
    assert journal.read(tmp_path / "runs" / "tiny_width=0.5" / "seed0")[: len(kept)] == kept  # gone on, not begun anew
    assert [len(net["runs"]) for net in found["nets"]] == [1, 1]
    assert found["nets"][0]["runs"] == between["nets"][0]["runs"]


@pytest.mark.parametrize("error", [UserError, RuntimeError, jax.errors.JaxRuntimeError, MemoryError])
def test_a_run_that_fails_does_not_keep_the_others(error, configs, tmp_path, monkeypatch):
    train = loop.train

    def fail(config, directory):
        if config.model.width == 0.5:
            raise error("the loss became nan" + (error is not UserError) * "\nand more")
        return train(config, directory)

    monkeypatch.setattr(loop, "train", fail)
    found = compare.run(compare_entries.make_entries(configs, MODELS[::-1]), 1, tmp_path)
    assert [net["failed"] for net in found["nets"]] == [["seed 0: the loss became nan"], []]
    assert [len(net["runs"]) for net in found["nets"]] == [0, 1]
    assert "the loss became nan" in (tmp_path / "compare.html").read_text()
    with pytest.raises(UserError, match="no run was finished; the first: seed 0: the loss became nan"):
        compare.run(compare_entries.make_entries(configs, MODELS[1:]), 1, tmp_path)


def test_runs_of_another_configuration_are_refused_before_any_work(finished, configs, trained):
    out, _ = finished
    changed = {name: config.copy_and_resolve_references() for name, config in configs.items()}
    next(iter(changed.values())).batch_size = 16
    with pytest.raises(UserError, match="batch_size was 32, is 16"):
        compare.run(compare_entries.make_entries(changed, ["tiny:dropout=0.1", "tiny"]), 1, out)
    assert trained == [] and not (out / "runs" / "tiny_dropout=0.1").exists()


@pytest.mark.parametrize(("field", "value"), [("num_epochs", 3), ("num_epochs", 1), ("eval_every_epochs", 2)])
def test_runs_of_another_length_are_refused(field, value, finished, configs, trained):
    """Gone on with, a run would be none that was made in one go, and stand beside such."""
    out, _ = finished
    changed = {name: config.copy_and_resolve_references() for name, config in configs.items()}
    next(iter(changed.values()))[field] = value
    with pytest.raises(UserError, match=rf"tiny.seed0 holds a run with config.{field}="):
        compare.run(compare_entries.make_entries(changed, MODELS), 2, out)
    assert trained == []


def test_nets_on_different_images_are_refused(configs, tmp_path):
    (config,) = configs.values()
    other = config.copy_and_resolve_references()
    other.dataset = "cifar10"
    entries = compare_entries.make_entries({"one": config, "other": other}, ["tiny"])
    with pytest.raises(UserError, match="config.dataset is 'digits' for tiny .one. and 'cifar10' for tiny .other."):
        compare.run(entries, 1, tmp_path)


@pytest.mark.parametrize(("name", "text"), [("compare.csv", "mine"), ("compare.json", "{}"), ("compare.json", "[1]")])
def test_a_file_that_is_no_table_of_ours_is_not_overwritten(name, text, configs, trained, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} is there, but no table of jaxnets.compare"):
        compare.run(compare_entries.make_entries(configs, MODELS), 1, tmp_path)
    assert trained == [] and (tmp_path / name).read_text() == text


def test_the_twin_for_large_images_is_another_net(configs):
    """A net without one keeps its classes at any size."""
    (entry, twin) = compare_entries.make_entries(configs, ["mobilenet_v1:width=0.25", "mobilenet_v1_cifar:width=0.25"])
    fields = {"width": 0.25}
    assert compare.timed_net(entry, 192, 7) == ("mobilenet_v1", 192, fields | {"num_classes": 7})
    assert compare.timed_net(twin, 192, 7) == ("mobilenet_v1", 192, fields)
    assert compare.timed_net(twin, None, 7) == ("mobilenet_v1_cifar", 16, fields | {"num_classes": 7})


def test_a_table_of_fewer_nets_says_so(finished, configs, tmp_path, caplog):
    out = shutil.copytree(finished[0], tmp_path / "copy")
    with caplog.at_level("INFO"):
        compare.run(compare_entries.make_entries(configs, MODELS[:1]), 2, out)
    assert "no longer shows tiny:width=0.5; their runs stay" in caplog.text


def test_a_size_that_cannot_be_timed_is_refused_before_training(configs, trained, tmp_path):
    entries = compare_entries.make_entries(configs, ["tiny", "mobilenet_v1_cifar:width=0.25"])
    with pytest.raises(UserError, match="image_size"):
        compare.run(entries, 1, tmp_path / "out", latency_size=1 << 20, latency_batch=2)
    assert trained == [] and not (tmp_path / "out").exists()


def test_where_it_was_trained_stays_with_a_run(finished, configs, monkeypatch):
    """Also where the table is written again on another machine."""
    out, _ = finished
    here = compare.machine.describe()
    monkeypatch.setattr(compare.machine, "describe", lambda: here | {"device": "another machine"})
    compare.run(compare_entries.make_entries(configs, MODELS), 2, out)
    written = (out / "compare.md").read_text()
    assert "another machine" not in written and f"Trained on: {compare.machine.sentence(here)} (from 20" in written


def test_a_net_keeps_no_field_of_the_configurations_own(repository):
    configs = compare.load_configs([f"{repository}/configs/mnv2.py:x0_5"], ["--config.model.dtype=bfloat16"], ("x",))
    entries = compare_entries.make_entries(
        configs, ["shufflenet_v2_x1_*_cifar", "mobilenet_v2_cifar:width=0.75:activation=silu"]
    )
    assert [entry.label for entry in entries] == [
        "shufflenet_v2_x1_0_cifar",
        "shufflenet_v2_x1_5_cifar",
        "mobilenet_v2_cifar:width=0.75:activation=silu",
    ]
    assert [entry.config.model.width for entry in entries] == [None, None, 0.75]
    assert {entry.config.model.dtype for entry in entries} == {"bfloat16"}
    assert entries[2].config.model.activation == "silu"
    own = compare_entries.make_entries(configs)
    assert [(entry.label, entry.config.model.width) for entry in own] == [("mnv2_x0_5", 0.5)]


def test_a_folder_of_images_has_the_same_name_in_any_working_directory(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (config,) = compare.load_configs([f"{repository}/configs/mnv2.py"], ["--config.dataset=folder:photos"]).values()
    assert config.dataset == f"folder:{tmp_path / 'photos'}"


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (["nothing_*"], "no net matches"),
        (["tiny:width"], "must be FIELD=VALUE"),
        (["tiny", "tiny"], "twice"),
        (["tiny:name=resnet18_cifar"], "named in front of its fields"),
        (["tiny:width=1", "tiny_width=1"], "twice"),  # one folder
    ],
)
def test_nets_that_cannot_be_compared_are_refused(configs, models, says):
    with pytest.raises(UserError, match=says):
        compare_entries.make_entries(configs, models)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds=0"], "--seeds=0"),
        (["--models=tiny", "--config.model.width=0.5"], "--models=NAME:width=VALUE"),
        (["--models=no_such_net"], "no net 'no_such_net'"),
        (["--models=no_net:stage_strides=(1,2),tiny"], "no net 'no_net'"),
        (["--models=tiny:no_field=1"], "no field 'no_field'"),
        (["--latency_batch=-1"], "--latency_batch"),
        (["--epochs=3"], "unexpected argument"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, says, repository, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=says):
        compare.main(["compare", f"--out={out}", f"--config={repository}/configs/digits.py", *arguments])
    assert not out.exists()


def test_large_images_are_timed_on_the_net_made_for_them(configs, tmp_path, monkeypatch):
    timed = []

    def measure(model, shape, **arguments):
        timed.append((type(model).__name__, model.stem_stride, model.width, model.num_classes, shape))
        return {"ms": 1.0, "low_ms": 1.0, "high_ms": 1.0, "calls": 1}

    monkeypatch.setattr(latency, "measure", measure)
    (entry,) = compare_entries.make_entries(configs, ["mobilenet_v1_cifar:width=0.25"])
    compare.measure_latency(entry, 96, 4, 10, tmp_path)
    assert timed == [("MobileNetV1", 2, 0.25, 1000, (n, 96, 96, 3)) for n in (1, 4)]
    found = compare.read_latency(tmp_path, entry)
    assert found["model"] == "mobilenet_v1"
    compare.measure_latency(entry, 96, 4, 10, tmp_path)
    assert len(timed) == 2  # known already
    compare.measure_latency(entry, None, 4, 10, tmp_path)
    assert timed[2:] == [("MobileNetV1", 1, 0.25, 10, (n, 16, 16, 3)) for n in (1, 4)]


@pytest.mark.parametrize("name", compare.PRESETS)
def test_a_preset_can_be_trained(name, repository, tmp_path):
    preset = compare.PRESETS[name]
    configs = compare.load_configs([f"{repository}/configs/default.py"], preset.overrides, preset.models)
    entries = compare_entries.make_entries(configs, preset.models)
    for entry in entries:
        entry.config.batch_size = entry.config.eval_batch_size = 100
    compare.check(entries, 1, tmp_path)
    assert [entry.config.model.name for entry in entries] == list(preset.models)
    assert {entry.config.num_epochs for entry in entries} == {3}


def test_the_users_fields_come_after_the_presets(repository):
    overrides = [*compare.PRESETS["classic"].overrides, "--config.num_epochs=1"]
    assert config_file.load(f"{repository}/configs/default.py", overrides).num_epochs == 1
