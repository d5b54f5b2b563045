"""The command of a comparison: what it prints, and how it refuses bad arguments."""

import json
import subprocess
import sys

import pytest

from jaxnets import compare, loop, models
from jaxnets.errors import UserError
from tests.tiny_net import TinyNet, diverging_at

pytestmark = pytest.mark.usefixtures("undrawn")

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


def test_the_table_is_printed_and_written(repository, digits_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)
    out, config = tmp_path / "out", f"--config={repository}/configs/digits.py"
    command = [f"--out={out}", "--models=tiny,tiny:width=0.5", "--seeds=1", "--latency_batch=0", config]
    compare.main(["compare", *command, f"--config.data_dir={digits_dir}", *SMALL])
    *table, result = capsys.readouterr().out.splitlines()
    assert json.loads(result) == {"page": str(out / "compare.html"), "runs": 2, "failed": []}
    assert table[0].startswith("| net | parameters |") and len(table) == 4
    written = (out / "compare.md").read_text()
    assert "\n".join(table) in written and "`python -m jaxnets.compare --out=" in written


def test_a_run_that_failed_is_told_below_the_table(repository, digits_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)
    monkeypatch.setattr(loop, "train", diverging_at(0.5, loop.train))
    command = [f"--out={tmp_path / 'out'}", "--models=tiny:width=0.5,tiny", "--seeds=2", "--latency_batch=0"]
    small = [f"--config={repository}/configs/digits.py", f"--config.data_dir={digits_dir}", *SMALL]
    with pytest.raises(UserError, match="^failed: tiny:width=0.5, seed 0: the loss became nan; and 1 more$"):
        compare.main(["compare", *command, *small, "--config.num_epochs=1"])
    *table, result = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and json.loads(result)["runs"] == 2
    assert "the loss became nan" in (tmp_path / "out" / "compare.html").read_text()


def test_the_users_fields_come_after_the_presets(repository, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(compare.compare_runs, "run", lambda entries, *_, **how: asked.update(entries=entries, **how))
    monkeypatch.setattr(compare.compare_results, "table", lambda comparison: exit(0))
    command = [f"--out={tmp_path}", "--preset=classic", f"--config={repository}/configs/default.py"]
    for flags, train_accuracy in ([], True), (["--no-train_accuracy"], False):
        with pytest.raises(SystemExit):
            compare.main(["compare", *command, "--config.num_epochs=1", *flags])
        assert asked["train_accuracy"] is train_accuracy
    assert [entry.label for entry in asked["entries"]] == list(compare.PRESETS["classic"].models)
    assert {(entry.config.num_epochs, entry.config.batch_size) for entry in asked["entries"]} == {(1, 100)}
    assert asked["latency_size"] == 224


@pytest.mark.parametrize("command", ["compare", "figures", "report"])
def test_a_signal_ends_a_command_from_its_imports_on(command, repository):
    code = (
        "import runpy, sys\nfrom jaxnets import interruption\nsys.argv[1:] = ['--help']\n"
        "interruption.end_at_once = lambda: sys.exit(7 + ('jax' in sys.modules))\n"
        f"runpy.run_module('jaxnets.{command}', run_name='__main__')"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, timeout=300).returncode == 7


def test_outside_a_checkout_a_configuration_has_to_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no configs/default.py here: run it from the jaxnets checkout, or name a conf"):
        compare.main(["compare", "--models=mobilenet_v2_mini"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds=0"], "argument --seeds: '0' is not a whole number of at least 1"),
        (
            ["--models=mobilenet_v2_mini", "--config.model.width=0.5"],
            "--config.model.width belongs to one net: `compare --models=mobilenet_v2_cifar:width=0.5`",
        ),
        (["--latency_batch=99999999999"], "--latency_batch=99999999999 must be from 0 to 1048576"),
        (["--latency_size=0"], "--latency_size=0 must be from 1 to 4096"),
        (["--models=no_such_net"], "no net 'no_such_net'"),
        (["--models=no_net,no_net"], "no net 'no_net'"),
        (["--models=,"], "--models=',' names no net"),
        (["--models="], "--models='' names no net"),
        (["--models=no_net:stage_strides=(1,2),tiny"], "no net 'no_net'"),
        (["--models=mobilenet_v2_mini:no_field=1"], "no field 'no_field'"),
        (["--models=mobilenet_v1_cifar:features_only=True"], "features_only is not a field of a run's net"),
        (["--latency_batch=-1"], "--latency_batch"),
        (["--epochs=3"], "unexpected argument"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, says, repository, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=says):
        compare.main(["compare", f"--out={out}", f"--config={repository}/configs/digits.py", *arguments])
    assert not out.exists()
