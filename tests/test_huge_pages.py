"""A program is started again once, as itself, only where huge pages help, and never together with a host program."""

import os
import re
import signal
import subprocess
import sys

import pytest

from jaxnets import huge_pages
from tests.slow import slow_after

MADVISE = "always [madvise] never\n"
SET = "glibc.malloc.hugetlb=1"
# Says what it was started with and ends with what it reads; on any machine as on one where huge pages help.
PROGRAM = """
from jaxnets import huge_pages
if __name__ == "__main__":
    huge_pages._libc_version, huge_pages._kernel_modes = lambda: (2, 36), lambda: "always [madvise] never"
    huge_pages.restart()
import os, sys
print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), flush=True)
sys.exit(int(sys.stdin.readline()))
"""


@pytest.fixture(scope="module")
def environment(repository):
    kept = {k: v for k, v in os.environ.items() if k not in (huge_pages.TUNABLES, huge_pages.SWITCH)}
    return kept | {"PYTHONPATH": str(repository)}


@pytest.fixture
def run(tmp_path, environment):
    """Start the program, by default as a script: its process id, exit status, standard output and error."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*command, status="7", **variables):
        process = subprocess.Popen(
            [sys.executable, *(command or ("program.py", "a b", "--c=d"))],
            cwd=tmp_path,
            env=environment | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        out, err = process.communicate(status + "\n", timeout=60)
        return process.pid, process.returncode, out, err

    return run


@pytest.mark.parametrize(
    ("environment", "libc", "kernel", "expected"),
    [
        ({}, (2, 36), MADVISE, SET),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, (2, 35), MADVISE, f"glibc.malloc.arena_max=2:{SET}"),
        ({"GLIBC_TUNABLES": ""}, (3, 0), MADVISE, SET),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, (2, 36), MADVISE, None),  # the user's own choice
        ({"JAXNETS_HUGE_PAGES": "1"}, (2, 36), MADVISE, SET),
        ({"JAXNETS_HUGE_PAGES": "0"}, (2, 36), MADVISE, None),
        ({"JAXNETS_HUGE_PAGES": "off"}, (2, 36), MADVISE, None),
        ({}, (2, 34), MADVISE, None),
        ({}, (), MADVISE, None),
        ({}, (2, 36), "always madvise [never]\n", None),
        ({}, (2, 36), "[always] madvise never\n", None),
        ({}, (2, 36), "", None),
    ],
)
def test_huge_pages_are_asked_for_where_they_help(environment, libc, kernel, expected):
    assert huge_pages.tunables(environment, libc, kernel) == expected


def test_what_is_set_is_not_set_again():
    once = huge_pages.tunables({}, (2, 36), MADVISE)
    assert huge_pages.tunables({"GLIBC_TUNABLES": once}, (2, 36), MADVISE) is None


def test_a_program_is_restarted_once_and_is_the_same(run):
    pid, status, out, err = run()
    assert status == 7 and out == f"{pid} ['a b', '--c=d'] {SET}\n"
    assert err.count("huge pages: restarting with GLIBC_TUNABLES=glibc.malloc.hugetlb=1") == err.count("\n") == 1


def test_a_module_is_restarted_as_a_module(run):
    pid, status, out, _ = run("-m", "program", "x")
    assert status == 7 and out == f"{pid} ['x'] {SET}\n"


def test_it_is_turned_off_by_the_environment(run):
    pid, status, out, err = run(JAXNETS_HUGE_PAGES="0")
    assert status == 7 and out == f"{pid} ['a b', '--c=d'] None\n" and err == ""


@pytest.mark.parametrize("host", ["import runpy; runpy.run_path('program.py', run_name='__main__')", "import program"])
def test_a_program_within_another_is_left_alone(run, host):
    pid, status, out, err = run("-c", host)
    assert status == 7 and out.startswith(str(pid)) and "None" in out and err == ""


def test_the_restarted_program_ends_on_the_signal_it_gets(tmp_path, environment):
    (tmp_path / "program.py").write_text(PROGRAM)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path, env=environment, **pipes)
    assert process.stdout.readline().endswith(f"{SET}\n".encode())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


def test_the_module_is_imported_without_jax(environment):
    code = "import jaxnets.huge_pages, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.parametrize(
    "command", slow_after(1, [["train.py"], ["-m", "jaxnets.evaluate"], ["-m", "jaxnets.predict"]])
)
def test_the_commands_restart_before_they_import_jax(environment, repository, command):
    if huge_pages.tunables({}, huge_pages._libc_version(), huge_pages._kernel_modes()) is None:
        pytest.skip("needs Linux with glibc 2.35 and transparent huge pages by madvise")
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
    )
    before, after = ended.stderr.split("huge pages: restarting with")
    assert not re.search(r"\| +jax$", before, re.MULTILINE)
    assert re.search(r"\| +jax$", after, re.MULTILINE)
