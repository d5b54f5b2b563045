"""Text files that are read only where they are plain, and files that are written whole."""

import errno
import os
from pathlib import Path

import pytest

from jaxnets import plain_files
from jaxnets.errors import UserError


def test_text_up_to_its_limit(tmp_path):
    file = tmp_path / "text"
    file.write_text("über")
    assert plain_files.read_text(file, 5) == "über"
    with pytest.raises(UserError, match="longer than 4 bytes"):
        plain_files.read_text(file, 4)


def test_what_is_no_plain_text_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("pipe", "bytes", "."):
        with pytest.raises(UserError, match="cannot be read"):
            plain_files.read_text(tmp_path / name, 100)
    with pytest.raises(FileNotFoundError):
        plain_files.read_text(tmp_path / "missing", 100)


def test_json_that_nests_too_deeply_is_a_value_error():
    assert plain_files.parse_json('{"a": [1]}') == {"a": [1]}
    for text in ("[" * 100_000, "{", ""):
        with pytest.raises(ValueError):
            plain_files.parse_json(text)


def test_a_file_is_replaced_at_the_end_of_the_block_alone(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(KeyError), plain_files.replacing(file) as scratch:
        scratch.write_text("half")
        raise KeyError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    with plain_files.replacing(file) as scratch:
        scratch.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_two_processes_that_replace_a_file_at_once_leave_one_of_theirs(tmp_path):
    file = tmp_path / "file"
    with plain_files.replacing(file) as ours, plain_files.replacing(file, ".7") as theirs:
        ours.write_text("ours")
        theirs.write_text("theirs")
    assert file.read_text() == "ours" and list(tmp_path.iterdir()) == [file]


def test_files_are_set_aside_together_and_replace_nothing(tmp_path):
    files = [tmp_path / f"table.{ending}" for ending in ("json", "md", "csv")]
    for file in (*files[:2], tmp_path / "table.1.csv", tmp_path / "table.2.md"):
        file.write_text(file.name)
    moved = plain_files.set_aside(files)
    assert [path.name for path in moved] == ["table.1.json", "table.1.md"]
    files[1].write_text("again")
    assert [path.name for path in plain_files.set_aside(files)] == ["table.3.md"]
    contents = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert contents == {
        "table.1.json": "table.json",
        "table.1.md": "table.md",
        "table.1.csv": "table.1.csv",
        "table.2.md": "table.2.md",
        "table.3.md": "again",
    }


def test_the_first_of_the_files_that_are_set_aside_goes_last(tmp_path, monkeypatch):
    """By it a command knows the others for its own, should it be killed between them."""
    files, order = [tmp_path / "table.json", tmp_path / "table.md"], []
    for file in files:
        file.touch()
    monkeypatch.setattr(Path, "rename", lambda path, _: order.append(path))
    plain_files.set_aside(files)
    assert order == files[::-1]


def test_a_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    file, order = tmp_path / "file", []
    sync, replace = os.fsync, os.replace

    def note_sync(descriptor):
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def note_replace(*paths):
        order.append("renamed")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    with plain_files.replacing(file) as scratch:
        scratch.write_text("new")
    assert order == [str(scratch), "renamed", str(tmp_path)]


def test_a_folder_that_cannot_be_synced_is_as_good(tmp_path, monkeypatch):
    """As on some file systems of networks: the file has its name by then."""
    sync = os.fsync

    def fails(descriptor):
        if os.path.isdir(os.readlink(f"/proc/self/fd/{descriptor}")):
            raise OSError(errno.EINVAL, "not here")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    with plain_files.replacing(tmp_path / "file") as scratch:
        scratch.write_text("new")
    assert (tmp_path / "file").read_text() == "new"


def test_a_path_begins_at_home_where_it_says_so(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert [str(plain_files.user_path(text)) for text in ("~/runs", "a/~b")] == ["/home/someone/runs", "a/~b"]
    assert str(plain_files.user_path("~no-such-user/runs")) == "~no-such-user/runs"
