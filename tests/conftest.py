"""Shared fixtures: the data at hand, a compilation cache, and an importable torchvision."""

import gc
import importlib.util
import logging
import os
import resource
import shutil
import tempfile
from pathlib import Path

import jaxlib

# Before jax is imported: one compilation cache for the whole suite and its child processes.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jaxnets-test-jax-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # of each operation the whole stack, which nobody reads
# Four CPU devices to spread a batch over; a computation that names none runs on the first. What XLA and LLVM make of
# the loops is not ours to test, and takes longer than they do.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        *(["--xla_cpu_use_fusion_emitters=false"] if jaxlib.__version__.startswith("0.10.") else []),  # none later
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Or PyTorch would take a GPU where JAX does not.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "" if os.environ["JAX_PLATFORMS"] == "cpu" else "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest

# Tracing makes objects by the million: looked through as often as by default, they take a tenth of all time.
gc.set_threshold(50_000, 20, 20)

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


class TestModule(pytest.Module):
    """Skipped where it imports PyTorch and there is none; single tests use `pytest.importorskip`."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            missing = getattr(error.__cause__, "name", None)
            if missing in ("torch", "torchvision", "timm"):
                pytest.skip(f"needs {missing}, which is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path, parent):
    return TestModule.from_parent(parent, path=module_path)


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist's order, by number of tests, has the few long ones last
    if config.getoption("numprocesses", None) or not importlib.util.find_spec("torch"):
        return  # the workers import what they need
    import torch

    from jaxnets.torch_nets import import_torchvision

    torch.set_num_threads(1)  # the test processes share the cores; more threads would wait for each other
    import_torchvision()


def pytest_collection_finish(session):
    """What was imported stays: it is not looked through again."""
    gc.collect()
    gc.freeze()


def share_of_memory() -> int:
    """A third of what each process of the tests could have, 3 to 6 GiB, for what is traced, compiled and all else."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(max(3 << 30, total // (3 * int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))), 6 << 30)


def resident_bytes() -> int:
    """Of this process: now, or where the system does not tell, at most so far."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """What modules have traced and compiled, where it has come to fill gigabytes."""
    import jax

    from jaxnets import programs

    programs.LIMIT = 1000  # of one module: none is compiled again
    yield
    programs.forget()
    if resident_bytes() > share_of_memory():
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder beside the checkout with real data, weights and photographs; skips where it is missing."""
    if not SHARED.is_dir():
        pytest.skip("needs the data folder `shared` beside the checkout (real CIFAR-10, weights, photographs)")
    return SHARED


@pytest.fixture(scope="module")
def undrawn():
    """No pages of the runs that are trained: most of a second each, and drawn in tests of their own."""
    from jaxnets import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda workdirs: None)
        yield


@pytest.fixture
def caplog(caplog, monkeypatch):
    """What jaxnets logs too, though a command in this process keeps it from the root logger."""
    from jaxnets import runtime

    logger = logging.getLogger("jaxnets")
    for name in ("handlers", "level", "propagate"):  # as they were, after the test
        monkeypatch.setattr(logger, name, list(logger.handlers) if name == "handlers" else getattr(logger, name))
    runtime.configure_logging()  # which a run in the test would do else, after this
    monkeypatch.setattr(logger, "propagate", True)
    return caplog


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> Path:
    """A data directory with the digits, to be read only."""
    from jaxnets import data

    place = tmp_path_factory.mktemp("digits")
    data.open_split("digits", "train", place, image_size=8)
    return place


@pytest.fixture(scope="session")
def six_saved(tmp_path_factory) -> Path:
    """A workdir with the checkpoints of `linear_runs.save_six`, to be read only."""
    from tests.linear_runs import save_six

    save_six(workdir := tmp_path_factory.mktemp("saved"))
    return workdir


@pytest.fixture
def six(six_saved, tmp_path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(six_saved, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def root(digits_dir, tmp_path_factory) -> Path:
    """A data directory with the digits and a foreign data set."""
    from tests.photo_set import Photos

    root = shutil.copytree(digits_dir, tmp_path_factory.mktemp("data"), dirs_exist_ok=True)
    Photos(data_dir=root, file_format="array_record").download_and_prepare()
    return root


@pytest.fixture(scope="session")
def digits(root):
    """The training split of the digits, 8 pixels wide."""
    from jaxnets import data

    return data.open_split("digits", "train", root, image_size=8)


@pytest.fixture(scope="session")
def decoded(digits):
    """The batch of all its images."""
    from jaxnets import data

    return data.decode(digits, progress=False)
