"""Shared fixtures: the data at hand, a compilation cache, and an importable torchvision."""

import os
import tempfile
from pathlib import Path

# Before jax is imported: one compilation cache for the whole suite and its child processes.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jaxnets-test-jax-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Four CPU devices to spread a batch over; a computation that names none runs on the first.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
import torch

from jaxnets.torch_nets import import_torchvision

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


torch.set_num_threads(1)  # the test processes share the cores; more threads would wait for each other
import_torchvision()


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
