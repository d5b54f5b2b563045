"""One run on several processes, on loopback: equal to one process's, stopped together, missed when one is lost."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxnets import checkpoint, distributed, journal, loop
from jaxnets.errors import UserError
from jaxnets.restore import restore_item
from tests.chaos.runs import make_config
from tests.tiny_net import registered

# How the processes learn of each other: by flags, as JAX is told, or as they are found in a job of a scheduler.
CLUSTERS = {
    "flags": lambda port, count, i: {},
    "jax": lambda port, count, i: {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(i),
    },
    "slurm": lambda port, count, i: {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
        "JAX_COORDINATOR_PORT": str(port),
    },
    "open mpi": lambda port, count, i: {
        "OMPI_MCA_orte_hnp_uri": f"4096.0;tcp://127.0.0.1:{port}",
        "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_RANK": str(i),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
        "JAX_COORDINATOR_PORT": str(port),
    },
}
NOT_FOR_CHILDREN = ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_ADDRESS")


@pytest.fixture(scope="module")
def start(repository, digits_dir):
    """Start the tiny run as so many processes with so many devices each; all are ended with the test module."""
    started = []

    def start(workdir, *flags, processes=1, devices=4, cluster="flags", of_last=(), **variables):
        environment = {name: value for name, value in os.environ.items() if name not in NOT_FOR_CHILDREN} | {
            "TFDS_DATA_DIR": str(digits_dir),
            "XLA_FLAGS": re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"]),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TINY_UNDRAWN": "1",
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
        command = [sys.executable, "-m", "tests.tiny_run", "--config=tests/tiny_run.py", f"--workdir={workdir}", *flags]
        children = []
        for number in range(processes):
            told = processes > 1 and cluster == "flags"
            arguments = [*command, *([*address, f"--process_id={number}"] if told else [])]
            arguments += of_last if number == processes - 1 else ()
            found = CLUSTERS[cluster](port, processes, number) if processes > 1 else {}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            children.append(subprocess.Popen(arguments, cwd=repository, env=environment | found | variables, **pipes))
        started.extend(children)
        return children

    yield start
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        child.wait()


def end(children, timeout=120):
    """The status, standard output and standard error of each child."""
    return [(child.returncode, *texts) for child in children for texts in [child.communicate(timeout=timeout)]]


@pytest.fixture(scope="module")
def runs(start, undrawn, digits_dir, tmp_path_factory):
    """The workdirs of the same run as 1 process x 4 devices, this one, and as 2 x 2."""
    root = tmp_path_factory.mktemp("runs")
    with registered():
        loop.train(make_config(digits_dir, checkpoint_every_steps=2), root / "1")
    children = start(root / "2", "--config.checkpoint_every_steps=2", processes=2, devices=2, cluster="jax")
    return {1: root / "1", 2: root / "2", "ends": end(children)}


def numbers(workdir):
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in journal.read(workdir)]


def arrays(workdir, name="variables", which="latest"):
    manager = checkpoint.open_reader(workdir)
    return restore_item(manager, checkpoint.find_step(manager, which), name)


def assert_equal_runs(one, other):
    """The same records and the same last checkpoint, to what another order of a sum may change."""
    for expected, found in zip(numbers(one), numbers(other), strict=True):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            exact = name in ("step", "epoch", "num_examples") or "accuracy" in name
            assert found[name] == (value if exact else pytest.approx(value, abs=1e-5)), (expected["step"], name)
    for name in ("variables", "rest"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), arrays(one, name), arrays(other, name)
        )


def test_two_processes_train_as_one_does(runs):
    assert len(numbers(runs[2])) == 12  # ten steps and two evaluations, each once
    assert_equal_runs(runs[1], runs[2])


def test_the_processes_speak_and_write_once(runs):
    (status, out, err), (other_status, other_out, other_err) = runs["ends"]
    assert status == other_status == 0
    assert json.loads(out.splitlines()[-1])["num_examples"] == 50  # above it Gloo says how it connects
    assert "{" not in other_out
    assert "evaluation loss" in err and "loss" not in other_err
    assert len(list((runs[2] / "tensorboard").iterdir())) == 1


def test_every_process_writes_its_part_of_a_checkpoint(runs):
    written = [len(list((runs[2] / "checkpoints/10/variables").glob(f"ocdbt.process_{i}/d/*"))) for i in (0, 1)]
    assert all(written), written


def test_they_save_within_an_epoch_together(runs):
    one, two = (set(checkpoint.open_reader(runs[number]).all_steps()) for number in (1, 2))
    assert one == two and two >= {6, 8, 10}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrote", "goes_on", "devices", "flags", "cluster"),
    [
        (1, 2, 1, ["--config.resident=false"], "slurm"),
        (2, 1, 2, ["--config.deterministic=True"], None),
    ],
)
def test_a_run_goes_on_with_other_processes_and_devices(runs, start, tmp_path, wrote, goes_on, devices, flags, cluster):
    workdir = tmp_path / "run"
    shutil.copytree(runs[wrote], workdir)
    shutil.rmtree(workdir / "checkpoints" / "10")
    (status, _, err), *_ = end(start(workdir, *flags, processes=goes_on, devices=devices, cluster=cluster))
    assert status == 0, err
    assert "at step 8 of 10" in err
    assert_equal_runs(runs[1], workdir)


HEARTBEAT = 8  # seconds, of a run of which a process is lost
LONG = ("--config.num_epochs=50000", "--config.eval_every_epochs=100", "--config.checkpoint_every_epochs=4")


def wait_for_checkpoint(workdir, children, after=0):
    """Until there is a checkpoint beyond step `after`; the step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(child.poll() is None for child in children):
        steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
        if max(steps, default=0) > after:
            return max(steps)
        time.sleep(0.1)
    raise AssertionError(end(children, timeout=1))


def test_a_signal_to_one_ends_all_at_one_step_and_a_loss_is_named_and_survived(start, tmp_path):
    workdir = tmp_path / "run"
    children = start(workdir, *LONG, processes=2, devices=1)
    first = wait_for_checkpoint(workdir, children)
    children[1].send_signal(signal.SIGTERM)
    results = end(children)
    assert [status for status, *_ in results] == [128 + signal.SIGTERM] * 2, results
    stopped = int(re.search(r"saved step (\d+)", results[0][2])[1])
    assert stopped >= first and (workdir / "checkpoints" / str(stopped)).is_dir()

    children = start(workdir, *LONG, processes=2, devices=1, TINY_HEARTBEAT_SECONDS=str(HEARTBEAT))
    wait_for_checkpoint(workdir, children, after=stopped)
    children[1].kill()
    killed = time.monotonic()
    (status, _, err), _ = end(children, timeout=HEARTBEAT + 30)
    assert f"at step {stopped} of" in err
    assert status == 1 and "error: process 1 of 2 has ended or cannot be reached" in err, err
    assert time.monotonic() - killed < HEARTBEAT + 10
    assert_no_step_is_lost_or_doubled(workdir)


@pytest.mark.slow
def test_a_loss_of_process_0_is_said_and_survived(start, tmp_path):
    """It holds the coordination service."""
    workdir, saved = tmp_path / "run", 0
    for _ in range(2):
        children = start(workdir, *LONG, processes=2, devices=1)
        latest = wait_for_checkpoint(workdir, children, after=saved)
        children[0].kill()
        killed = time.monotonic()
        (_, _, first_err), (status, _, err) = end(children, timeout=60)
        if saved:
            assert saved <= int(re.search(r"at step (\d+) of", first_err)[1]) < latest
        assert status != 0 and re.search("process 0 of 2 has ended|leader task", err), err
        assert time.monotonic() - killed < 10
        saved = latest
    assert_no_step_is_lost_or_doubled(workdir)


def assert_no_step_is_lost_or_doubled(workdir):
    steps = [record["step"] for record in journal.read(workdir) if "loss" in record]
    assert steps == list(range(1, steps[-1] + 1))


@pytest.mark.slow
def test_bad_input_is_one_sentence_from_every_process(start, tmp_path):
    results = end(start(tmp_path / "run", "--config.batch_size=3", processes=2, devices=1, cluster="jax"))
    for status, out, err in results:
        assert status == 1 and "{" not in out and "config.batch_size=3 must be a multiple of the 2 devices" in err
        assert "Traceback" not in err and "stack trace" not in err
    assert not (tmp_path / "run").exists()


def test_processes_with_different_configurations_are_refused(start, tmp_path):
    """One cluster, two commands: what they train would be neither's run."""
    command = {"processes": 2, "devices": 1, "cluster": "open mpi"}
    results = end(start(tmp_path / "run", **command, of_last=["--config.seed=1"]))
    for status, out, err in results:
        assert status == 1 and "{" not in out
        assert "the configuration differs between process 1 and process 0" in err, err
        assert "Traceback" not in err and "stack trace" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({}, {"num_processes": 2}, "coordinator_address should be defined"),
        ({}, {"coordinator_address": "127.0.0.1:1"}, "--num_processes=N"),
        ({}, {"coordinator_address": "127.0.0.1:1", "num_processes": 2, "process_id": 2}, "process_id=2"),
        ({"JAX_NUM_PROCESSES": "two"}, {}, "JAX_NUM_PROCESSES='two'"),
    ],
)
def test_a_cluster_described_by_halves_is_refused(monkeypatch, environment, arguments, message):
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(message)), distributed.joined(**arguments):
        pass


def test_a_pod_that_is_no_part_of_a_job_trains_alone(monkeypatch):
    asked = []
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(jax._src.clusters.K8sCluster, "is_env_present", lambda: asked.append(1))
    with distributed.joined():
        assert not distributed.many() and not asked


def test_alone_a_process_agrees_with_itself():
    assert not distributed.many() and distributed.is_primary() and distributed.share() == (0, 1)
    assert distributed.on_primary(lambda: {"any": "thing"}) == {"any": "thing"}
    assert distributed.primary_first(lambda: 3) == 3
    with pytest.raises(UserError, match="as it is"):
        distributed.on_primary(lambda: (_ for _ in ()).throw(UserError("as it is")))
