"""A streamed split gives the resident batches, from processes that end when they should."""

import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from functools import partial
from multiprocessing import shared_memory
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from jaxnets import data, sampling, streaming
from jaxnets.errors import UserError
from tests.photo_set import flip_one_record
from tests.slow import slow_after


def assert_plain(batch):
    """Ordinary arrays of their own, not windows into memory that a worker's queue will free."""
    for value in batch.values():
        assert type(value) is np.ndarray and (value.base is None or type(value.base) is np.ndarray)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_streams_the_resident_batches(num_workers, digits, decoded):
    """22 steps an epoch, from the middle of epoch 1 into epoch 3, calls of at most 5 steps."""
    start, end = 30, 70
    indices = sampling.train_indices(3, len(digits), 64, start, end - start)
    stream = streaming.stream_train(
        digits, seed=3, batch_size=64, start_step=start, end_step=end, num_workers=num_workers, steps_per_call=5
    )
    calls = list(stream)
    assert [len(call["label"]) for call in calls] == [5, 5, 4, 5, 5, 5, 5, 2, 4]
    for call in calls:
        assert_plain(call)
        assert (call["image"].dtype, call["label"].dtype) == (np.uint8, np.int32)
    for name in ("image", "label"):
        np.testing.assert_array_equal(np.concatenate([call[name] for call in calls]), decoded[name][indices])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_streams_the_resident_batches(num_workers, digits, decoded, monkeypatch, caplog):
    """With the little shared memory that a container has threads read them, and it is said."""

    class Refused(shared_memory.SharedMemory):
        def __init__(self, *args, **kwargs):
            raise AssertionError("shared memory was used")

    gc.collect()  # arrays of an earlier stream look for the class that is replaced here
    monkeypatch.setattr(streaming, "_shared_memory_bytes", lambda: 500_000)
    streaming._say_threads.cache_clear()
    monkeypatch.setattr(shared_memory, "SharedMemory", Refused)
    index, mask = sampling.eval_indices(len(digits), 400)
    batches = list(streaming.stream_eval(digits, batch_size=400, num_workers=num_workers))
    assert len(batches) == 4
    assert ("may need 0 MB of shared memory, but only 0 MB are free" in caplog.text) == bool(num_workers)
    for batch, expected_index, expected_mask in zip(batches, index, mask):
        assert_plain(batch)
        np.testing.assert_array_equal(batch["mask"], expected_mask)
        for name in ("image", "label"):
            np.testing.assert_array_equal(batch[name][expected_mask], decoded[name][expected_index[expected_mask]])
            assert not batch[name][~expected_mask].any()


@pytest.mark.parametrize("count", [2, 4])
def test_the_parts_of_several_processes_make_up_the_batches_of_one(digits, count):
    """Each process reads its share, in the places that the shares have in the batch of one process."""
    sizes = {"seed": 3, "batch_size": 40, "num_workers": 0, "steps_per_call": 3, "start_step": 33, "end_step": 40}
    streams = {
        "train": (partial(streaming.stream_train, digits, **sizes), 1),
        "eval": (partial(streaming.stream_eval, digits, batch_size=400, num_workers=0), 0),
    }
    for stream, axis in streams.values():
        parts = [list(stream(part=(i, count))) for i in range(count)]
        for whole, *shares in zip(stream(), *parts, strict=True):
            for name in whole:
                joined = np.concatenate([share[name] for share in shares], axis=axis)
                np.testing.assert_array_equal(joined, whole[name])


def test_empty_stream(digits):
    sizes = {"seed": 0, "batch_size": 64, "num_workers": 2, "steps_per_call": 5}
    assert list(streaming.stream_train(digits, start_step=10, end_step=10, **sizes)) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"batch_size": 2000}, "batch_size"), ({"num_workers": -1}, "num_workers"), ({"steps_per_call": 0}, "steps_per")],
)
def test_stream_refuses_at_once(changed, message, digits):
    sizes = {"batch_size": 64, "num_workers": 0, "steps_per_call": 5} | changed
    with pytest.raises(UserError, match=message):
        streaming.stream_train(digits, seed=0, start_step=0, end_step=10, **sizes)


@pytest.mark.parametrize(
    ("asked", "cores", "batches", "free", "expected"),
    [
        (None, 4, 100, 10**9, (4, 0)),
        (None, 40, 100, 10**9, (16, 0)),
        (None, 4, 3, 10**9, (3, 0)),
        (None, 4, 100, 2 * 10**7, (2, 0)),  # as many as there is room for
        (None, 8, 100, 2 * 10**7, (0, 8)),  # but not less than half
        (3, 4, 100, 2 * 10**7, (0, 3)),
        (0, 4, 100, 10**9, (0, 2)),
    ],
)
def test_how_many_read(asked, cores, batches, free, expected, monkeypatch):
    monkeypatch.setattr(streaming.cores, "count", lambda: cores)
    monkeypatch.setattr(streaming, "_shared_memory_bytes", lambda: free)
    processes, threads = streaming._readers(asked, batches, 10**6)
    assert (processes, 0 if processes else threads) == expected


@pytest.mark.parametrize(("bound", "expected"), [(False, 2), (True, 8)])
def test_processes_of_a_run_on_one_machine_share_its_cores(bound, expected, monkeypatch):
    """Unless each is bound to cores of its own."""
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    monkeypatch.setattr(streaming.cores, "count", lambda: 8)
    monkeypatch.setattr(streaming.cores, "usable", lambda: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 32 if bound else 8)
    monkeypatch.setattr(streaming, "_shared_memory_bytes", lambda: 4 * 8 * 10**7)
    assert streaming._readers(None, 100, 10**6)[0] == expected


def workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_closing_ends_the_workers(digits):
    sizes = {"seed": 0, "batch_size": 16, "num_workers": 1, "steps_per_call": 2}
    stream = streaming.stream_train(digits, start_step=0, end_step=10_000, **sizes)
    next(stream)
    started = workers()
    assert len(started) == 1
    for worker in started:  # what a terminal or a batch system sends to the whole group
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGTERM)
    for _ in range(10):
        next(stream)
    stream.close()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive


def report(number: int) -> data.Batch:
    """What a worker process is like from inside."""
    from jax._src import xla_bridge

    return {
        "pid": np.array([os.getpid()]),
        "deaf": np.array([signal.getsignal(signal.SIGINT) == signal.SIG_IGN]),
        "blocked": np.array([len(signal.pthread_sigmask(signal.SIG_BLOCK, []))]),
        "backends": np.array([len(xla_bridge._backends)]),
        "on_cpu": np.array([jax.config.jax_platforms == "cpu"]),
        "simulated": np.array(["XLA_FLAGS" in os.environ]),
    }


def test_workers_stay_off_the_accelerator(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    reports = list(streaming._stream(report, 0, 2, num_workers=1, batch_bytes=100))
    assert len(reports) == 2 and all(report["pid"] != os.getpid() for report in reports)
    assert all(report["deaf"] for report in reports) and not any(report["blocked"] for report in reports)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])  # of ours
    assert not any(report["backends"] for report in reports)
    assert all(report["on_cpu"] for report in reports)
    assert not any(report["simulated"] for report in reports)


SCRIPT = """
    import sys, time
    import psutil
    from jaxnets import data, streaming

    if __name__ == "__main__":
        split = data.open_split("digits", "train", sys.argv[1], image_size=8)
        sizes = {"seed": 0, "batch_size": 16, "num_workers": 1, "steps_per_call": 2}
        stream = streaming.stream_train(split, start_step=0, end_step=10_000, **sizes)
        next(stream)
        print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
        if sys.argv[2] == "hang":
            time.sleep(600)
"""


@pytest.mark.parametrize("ending", slow_after(1, ["hang", "exit"]))
def test_workers_end_with_their_parent(ending, root, tmp_path):
    """Killed with no chance to clean up, or leaving the stream open when it exits."""
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(root), ending]
    environment = os.environ | {"PYTHONPATH": str(Path(streaming.__file__).parents[1])}
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2  # a worker and multiprocessing's resource tracker
    if ending == "hang":
        parent.kill()
    _, stderr = parent.communicate(timeout=60)

    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))
    if ending == "exit":
        assert parent.returncode == 0 and "Traceback" not in stderr


def test_killed_worker_is_reported(digits):
    sizes = {"seed": 0, "batch_size": 16, "num_workers": 1, "steps_per_call": 2}
    with closing(streaming.stream_train(digits, start_step=0, end_step=10_000, **sizes)) as stream:
        next(stream)
        workers()[0].kill()
        with pytest.raises(UserError, match="process that reads the data has ended"):
            for _ in stream:
                pass


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="shared memory is not a folder here")
@pytest.mark.parametrize("ending", slow_after(1, ["damaged", "closed", "last batch"]))
def test_shared_memory_goes_with_the_stream(ending, root, tmp_path, monkeypatch):
    """At once, whatever is left in circles: Python's end would come before the garbage is collected, and warn."""

    seen = set()  # names, since others on this machine have segments too

    class Seen(shared_memory.SharedMemory):
        def __init__(self, name=None, **kwargs):
            super().__init__(name, **kwargs)
            seen.add(self.name)

    def left():
        return seen & set(os.listdir("/dev/shm"))

    monkeypatch.setattr(shared_memory, "SharedMemory", Seen)
    shutil.copytree(root / "digits", tmp_path / "digits")
    split = data.open_split("digits", "test[:50]", tmp_path, image_size=8)
    if ending == "damaged":
        flip_one_record(next(tmp_path.rglob("digits-test.array_record-*")), split.source[40])
    gc.disable()
    try:
        stream = streaming.stream_eval(split, batch_size=4, num_workers=1)
        batches = itertools.islice(stream, 3) if ending == "closed" else stream
        said = ""
        try:
            assert len(list(batches)) == (3 if ending == "closed" else 13)
        except UserError as error:
            said = str(error)
        assert ("record 40 of digits" in said and str(tmp_path) in said and "\n" not in said) == (ending == "damaged")
        stream.close()
        assert not workers()
        deadline = time.monotonic() + 10  # Grain frees it in a thread
        while left() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert seen and not left()
    finally:
        gc.enable()


def test_damaged_record_is_named(root, tmp_path):
    shutil.copytree(root / "digits", tmp_path / "digits")
    record = data.open_split("digits", "test", tmp_path, image_size=8).source[123]
    flip_one_record(next(tmp_path.rglob("digits-test.array_record-*")), record)
    split = data.open_split("digits", "test", tmp_path, image_size=8)
    readers = {
        "decode": lambda: data.decode(split, progress=False),
        "threads": lambda: list(streaming.stream_eval(split, batch_size=50, num_workers=0)),
    }
    for read in readers.values():
        with pytest.raises(UserError, match="record 123 of digits test") as error:
            read()
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# Random-resized crops


def crops(split, start, stop, seed=3):
    stream = streaming.stream_train(
        split,
        seed=seed,
        batch_size=4,
        start_step=start,
        end_step=stop,
        num_workers=0,
        steps_per_call=1,
        crop_area=0.3,
    )
    with closing(stream):
        return [call["image"][0] for call in stream]


def test_random_crops_are_of_the_seed_the_epoch_and_the_image(root):
    split = data.open_split("photos", "train", root, image_size=16)
    whole = crops(split, 0, 4)  # two epochs of two steps
    np.testing.assert_array_equal(whole[3:], crops(split, 3, 4))
    assert not np.array_equal(whole, crops(split, 0, 4, seed=4))

    def by_image(epoch):
        order = sampling.train_indices(3, 8, 4, 2 * epoch, 2).ravel()
        return np.concatenate(whole[2 * epoch : 2 * epoch + 2])[np.argsort(order)]

    first, second = by_image(0), by_image(1)
    assert all(not np.array_equal(a, b) for a, b in zip(first, second))
    centred = data.decode(split, progress=False)["image"]
    assert all(not np.array_equal(a, b) for a, b in zip(first, centred))
