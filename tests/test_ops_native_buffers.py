"""XLA's large buffers, kept between calls: no page faults, no memory twice in use, no more than was in use at once."""

import os
import random
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets.ops.native import library

CODE = """
import resource
import jax, jax.numpy as jnp
from jaxnets.ops.native import library
library.available()
double = jax.jit(lambda x: 2 * x)
x = jax.block_until_ready(jnp.ones(100 << 18))
for turn in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    float(double(x)[-1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture(autouse=True)
def _kept():
    if not library.available() or jax.default_backend() != "cpu":
        pytest.skip("needs the native kernels")
    array = jax.block_until_ready(jnp.ones(8 << 18))
    if not library.buffer_bytes()[0]:
        pytest.skip("this C library's or jaxlib's buffers are not kept")
    del array


def page_faults(**environment):
    clean = {name: value for name, value in os.environ.items() if name not in (library.KEEP_MEMORY, "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", CODE]
    return int(subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True).stdout)


def test_a_call_finds_its_memory_again(repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert page_faults() < 200
    assert page_faults(**{library.KEEP_MEMORY: "0"}) > 10_000  # 100 MiB in pages of 4 KiB


@pytest.mark.parametrize("seed", range(3))
def test_buffers_in_use_share_no_memory(seed):
    rng = random.Random(seed)
    alive = {}
    for number in range(120):
        size = rng.choice((1, 1000, 1 << 20, (1 << 20) + 1, rng.randrange(1 << 20, 4 << 20)))
        alive[number] = jnp.full(size, number, jnp.float32)
        for other in rng.sample(sorted(alive), rng.randrange(3) if len(alive) > 8 else 0):
            del alive[other]
        used, held, most = library.buffer_bytes()
        assert used <= held <= most
    for number, array in alive.items():
        assert (np.asarray(array) == number).all()


def test_what_is_kept_is_taken_again_and_given_up_for_other_sizes():
    def held_after(megabytes):
        array = jax.block_until_ready(jnp.ones(megabytes << 18))
        most = library.buffer_bytes()[2]
        del array
        return library.buffer_bytes()[1], most

    held, most = held_after(256)  # more than any other test leaves in use
    assert held_after(256) == (held, most)
    for megabytes in (64, 200, 96, 255):
        held, most = held_after(megabytes)
        assert held <= most


def test_what_is_not_taken_again_is_given_up():
    jax.block_until_ready(jnp.ones(128 << 18))
    small = jnp.ones(8 << 18)
    for _ in range(300):
        small = jax.block_until_ready(small + 1)
    used, held, _ = library.buffer_bytes()
    assert held - used < 128 << 20


def test_threads_take_and_give_at_once():
    wrong = []

    def work(number):
        for turn in range(30):
            array = jnp.full((2 + turn % 3) << 20, number, jnp.float32)
            if not (np.asarray(array) == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_can_free_and_allocate():
    kept = jax.block_until_ready(jnp.ones(16 << 18))
    bytes_before = library.buffer_bytes()
    child = os.fork()
    if not child:  # only memory is touched: XLA's threads are not there
        used, _, _ = library.buffer_bytes()
        os._exit(0 if used == bytes_before[0] else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    del kept
