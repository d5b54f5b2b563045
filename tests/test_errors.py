"""Bad input ends a command with one line and status 1; a bug keeps its stack trace."""

import errno
import io
import os
import signal
import subprocess
import sys

import pytest

from jaxnets.errors import ArgumentParser, UserError, exit_on_user_error, writing


def test_a_user_error_is_one_line_and_status_1(capsys):
    @exit_on_user_error
    def main(argv):
        raise UserError(f"{argv[1]} must be a number")

    with pytest.raises(SystemExit) as caught:
        main(["program", "x"])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: x must be a number\n"


def test_ctrl_c_is_no_stack_trace(capsys):
    @exit_on_user_error
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_in_the_imports_is_quiet_and_then_one_line(repository):
    program = (
        "import os, signal\n"
        "from jaxnets import interruption\n"
        "from jaxnets.errors import exit_on_user_error\n"
        "interruption.end_quietly()\n"
        "interrupt = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "{where}"
    )
    for where, expected in (
        ("interrupt()", (-signal.SIGINT, "")),
        ("exit_on_user_error(interrupt)([])", (130, "interrupted\n")),
    ):
        command = [sys.executable, "-c", program.format(where=where)]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == expected


def test_a_file_that_the_system_keeps_from_us_is_one_line(capsys, tmp_path):
    @exit_on_user_error
    def main(argv):
        return (tmp_path / ("long" * 100)).stat()

    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path / ('long' * 100)}: File name too long\n"


def test_a_name_that_the_terminals_encoding_lacks_is_printed_escaped(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    exit_on_user_error(lambda argv: print(argv[1]))(["program", "café"])
    assert printed.getvalue() == rb"caf\xe9" + b"\n"


def test_a_bug_is_not_hidden():
    @exit_on_user_error
    def main(argv):
        raise argv

    for error in (IndexError(), OSError("of no file")):
        with pytest.raises(type(error)):
            main(error)


def test_a_bad_argument_is_a_user_error():
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--count", type=int)
    with pytest.raises(UserError, match="count.*tool --help"):
        parser.parse_args(["--count=x"])
    with pytest.raises(UserError, match="--coun=1"):
        parser.parse_args(["--coun=1"])  # not an abbreviation: --seed would be --seeds


def test_output_that_nobody_reads_any_longer_ends_it_quietly(repository):
    program = (
        "from jaxnets.errors import exit_on_user_error\n"
        "main = exit_on_user_error(lambda argv: print('line\\n' * {count}))\n"
        "main([])"
    )
    for count in (1, 100_000):  # less and more than Python buffers
        reader, writer = os.pipe()
        os.close(reader)
        process = subprocess.run(
            [sys.executable, "-c", program.format(count=count)],
            cwd=repository,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(writer)
        assert (process.returncode, process.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk without room")
def test_output_for_which_there_is_no_room_is_one_line(repository):
    program = "from jaxnets.errors import exit_on_user_error\nexit_on_user_error(lambda argv: print('line'))([])"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=repository, env=buffered, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")


def test_a_message_is_one_line_whatever_it_names():
    assert str(UserError("no \x1b[2J\nin caf\xe9\udcff")) == r"no \x1b[2J\nin café\udcff"


def test_a_write_that_fails_says_where_and_why(tmp_path):
    with pytest.raises(UserError, match=r"run cannot be written: No space left on device; what was saved before is"):  # noqa: SIM117
        with writing(tmp_path / "run"):
            raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("another mistake")
