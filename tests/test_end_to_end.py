"""The commands as a user runs them: train, kill, go on, evaluate, and every way to ask for the wrong thing."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxnets import checkpoint, evaluate, journal
from jaxnets.errors import UserError
from jaxnets.restore import restore_item
from tests.slow import mark_slow

SMALL = ["--config=tests/mini_digits.py"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A user's: no simulated devices, data sets in a folder of their own."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    shared = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}  # by all commands of this file
    own = {"XLA_FLAGS": " ".join(flags), "TFDS_DATA_DIR": str(tmp_path_factory.mktemp("tfds"))}
    return os.environ | shared | own


@pytest.fixture(scope="module")
def start(repository, environment):
    """Start one of the project's commands."""

    def start(*args, **env):
        return subprocess.Popen(
            [sys.executable, *map(str, args)],
            cwd=repository,
            env=environment | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="module")
def finish(start):
    """Run a command to its end: (status, standard output, standard error)."""

    def finish(*args, **env):
        process = start(*args, **env)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return finish


# Most of a start is imports, which these commands share: each is a fork of one process.
FORKS = """
import gc, json, os, runpy, sys, traceback
from jaxnets import evaluate, loop

gc.freeze()
for line in sys.stdin:
    command, out, err = json.loads(line)
    child = os.fork()
    if not child:
        for path, stream in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv = command[command[0] == "-m" :]
        run = runpy.run_module if command[0] == "-m" else runpy.run_path
        try:
            run(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def finish_quickly(repository, environment, tmp_path_factory):
    """As `finish`, for commands that nothing is to interrupt."""
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    out, err = (tmp_path_factory.mktemp("said") / name for name in ("out", "err"))
    with subprocess.Popen(command, cwd=repository, env=environment, **pipes) as forks:

        def finish_quickly(*args):
            print(json.dumps([[*map(str, args)], str(out), str(err)]), file=forks.stdin, flush=True)
            return int(forks.stdout.readline()), out.read_text(), err.read_text()

        yield finish_quickly
        forks.stdin.close()


def wait_for_step(workdir, step, process):
    """Wait until the journal of a running command has reached a step."""
    deadline = time.monotonic() + 240
    while not any(record["step"] >= step for record in journal.read(workdir)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def numbers(workdir):
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in journal.read(workdir)]


def everything_saved(workdir):
    manager = checkpoint.open_reader(workdir)
    step = checkpoint.find_step(manager, "latest")
    return step, [restore_item(manager, step, item) for item in ("variables", "rest")]


@pytest.fixture(scope="module")
def whole(finish_quickly, tmp_path_factory):
    """A run that nothing disturbed: its workdir and its result."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    status, out, err = finish_quickly("train.py", *SMALL, f"--workdir={workdir}")
    assert status == 0, err
    assert len(out.splitlines()) == 1
    return workdir, json.loads(out)


def test_a_killed_and_a_terminated_run_end_as_if_undisturbed(start, finish_quickly, whole, tmp_path):
    workdir = tmp_path / "run"
    command = ["train.py", *SMALL, f"--workdir={workdir}"]
    process = start(*command)
    wait_for_step(workdir, 13, process)  # in the second epoch
    process.kill()
    process.communicate()

    process = start(*command)
    wait_for_step(workdir, 17, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command resumes" in err and out == ""
    assert err.count("SIGTERM: ") == 1

    status, out, err = finish_quickly(*command)
    assert status == 0, err
    assert "resuming the run in" in err  # not begun anew, which would give the same
    assert json.loads(out) == whole[1]
    assert numbers(workdir) == numbers(whole[0])
    jax.tree.map(np.testing.assert_array_equal, everything_saved(workdir), everything_saved(whole[0]))


def test_evaluation_gives_the_numbers_of_the_log_and_needs_only_the_workdir(finish, whole):
    workdir, result = whole
    arguments = [f"--workdir={workdir}", "--checkpoint=latest"]
    status, out, err = finish("-m", "jaxnets.evaluate", *arguments, TFDS_DATA_DIR="/nowhere")
    assert status == 0, err
    evaluated = json.loads(out.splitlines()[-1])
    assert {name: evaluated[name] for name in ("eval_accuracy", "eval_loss", "num_examples", "step")} == {
        name: result[name] for name in ("eval_accuracy", "eval_loss", "num_examples", "step")
    }
    assert all(str(digit) in out for digit in range(10)) and "top-5" in out


def evaluated(capsys, *arguments):
    """The result that the command prints, in this process."""
    evaluate.main(["evaluate", *arguments])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_evaluation_on_four_devices_of_the_best_of_another_split_and_of_the_average(whole, capsys):
    workdir, result = f"--workdir={whole[0]}", whole[1]
    best = max(r["eval_accuracy"] for r in journal.read(whole[0]) if "eval_accuracy" in r)
    assert evaluated(capsys, workdir, "--batch_size=20")["eval_accuracy"] == best
    part = evaluated(capsys, workdir, "--batch_size=20", "--split=train[:7]", "--checkpoint=20")
    assert part["num_examples"] == 7 and part["step"] == 20
    last = evaluated(capsys, workdir, "--batch_size=20", "--checkpoint=latest")
    assert last["eval_accuracy"] == result["eval_accuracy"]
    assert last["eval_loss"] == pytest.approx(result["eval_loss"], rel=1e-5)
    average = evaluated(capsys, workdir, "--batch_size=20", "--checkpoint=latest", "--ema")
    assert average["eval_loss"] == pytest.approx(result["ema_eval_loss"], rel=1e-5)


REFUSED = {
    "no configuration": ([], "--config is missing"),
    "a missing file": (["--config=configs/mnv9.py"], "configs/mnv9.py"),
    "contradictory words": (["--config=configs/mnv2.py:quick,tutorial"], "quick and tutorial contradict each other"),
    "an unknown word": (["--config=configs/mnv2.py:x9"], "x0_5, x0_75, x1_0, x1_3, x1_4 and the recipes default"),
    "a folder that is not there": ([*SMALL, "--config.dataset=folder:nowhere"], "nowhere': there is no such folder"),
    "an unknown field": (["--config=configs/digits.py", "--config.model.widht=1"], "width"),
    "a word for a number": (["--config=configs/digits.py", "--config.batch_size=abc"], "batch_size"),
    "an unknown flag": (["--config=configs/digits.py", "--wrkdir=x"], "workdir"),
    "a stray argument": (["--config=configs/digits.py", "batch_size=3"], "batch_size=3"),
    "an unknown net": ([*SMALL, "--config.model.name=mobilenet_v8"], "mobilenet_v2"),
    "an unknown optimizer": ([*SMALL, "--config.optimizer.name=adamx"], "sgd, adamw"),
    "an unknown schedule": ([*SMALL, "--config.schedule.name=cos"], "cosine, linear"),
    "an unknown dtype": ([*SMALL, "--config.model.dtype=float17"], "bfloat16"),
    "an unknown data set": ([*SMALL, "--config.dataset=mnistt"], "digits"),
    "an empty split": ([*SMALL, "--config.eval_split=test[5:5]"], "test[5:5]"),
    "no batch": ([*SMALL, "--config.batch_size=0"], "config.batch_size"),
    "too large a batch": ([*SMALL, "--config.batch_size=1000"], "160 examples"),
    "a workdir that is a file": ([*SMALL, "--workdir=pyproject.toml"], "pyproject.toml"),
}


# The others are refused in tests of their own too, within a process.
USUAL = ("no configuration", "a missing file", "an unknown field", "an unknown flag", "an unknown net")
USUAL += ("a folder that is not there", "a workdir that is a file")


@pytest.mark.parametrize("case", [case if case in USUAL else mark_slow(case) for case in REFUSED])
def test_bad_input_is_one_sentence_and_status_1(finish_quickly, tmp_path, case):
    arguments, hint = REFUSED[case]
    workdir = [] if any(a.startswith("--workdir") for a in arguments) else [f"--workdir={tmp_path / 'run'}"]
    status, out, err = finish_quickly("train.py", *arguments, *workdir)
    assert status == 1 and out == ""
    assert hint in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused_with_the_fields_that_differ(finish_quickly, whole):
    before = numbers(whole[0])
    status, _, err = finish_quickly("train.py", *SMALL, "--config.seed=3", f"--workdir={whole[0]}")
    assert status == 1 and "seed was 0, is 3" in err
    assert numbers(whole[0]) == before


def test_evaluating_what_is_not_there_is_refused(finish_quickly, whole, tmp_path):
    status, out, err = finish_quickly("-m", "jaxnets.evaluate", f"--workdir={tmp_path}")
    assert status == 1 and out == "" and "not the workdir of a run" in err and "Traceback" not in err
    for arguments, hint in {
        (f"--workdir={whole[0]}", "--checkpoint=7"): "best, latest",
        (f"--workdir={whole[0]}", "--split=tset"): "tset",
        (): "--workdir",
    }.items():
        with pytest.raises(UserError, match=re.escape(hint)):
            evaluate.main(["evaluate", *arguments])


@pytest.mark.parametrize("command", [["train.py"], ["-m", "jaxnets.evaluate"]])
def test_help_names_the_workdir(finish_quickly, command):
    _, out, _ = finish_quickly(*command, "--help")
    assert "workdir" in out


def test_cifar10_trains_where_the_data_is(finish_quickly, shared_dir, tmp_path):
    """The main configuration on real CIFAR-10, as few images as say that it learns something."""
    status, out, err = finish_quickly(
        "train.py",
        "--config=configs/mnv2.py",
        f"--config.data_dir={shared_dir / 'tensorflow_datasets'}",
        "--config.train_split=train[:512]",
        "--config.eval_split=train[:512]",
        "--config.model.width=0.25",
        "--config.model.stem_stride=2",
        "--config.batch_size=32",
        "--config.num_epochs=6",
        "--config.eval_every_epochs=6",
        "--config.checkpoint_every_epochs=6",
        "--config.optimizer.name=adamw",
        "--config.optimizer.learning_rate=0.003",
        "--config.augment.crop_padding=0",
        "--config.progressive_sizes=()",
        f"--workdir={tmp_path / 'run'}",
    )
    assert status == 0, err
    result = json.loads(out)
    assert result["num_examples"] == 512 and result["eval_accuracy"] > 0.2
