"""Programs are made once for equal keys, and not kept forever."""

import threading
from concurrent.futures import ThreadPoolExecutor

from jaxnets import programs


def test_equal_keys_have_one_program_until_it_is_forgotten(monkeypatch):
    monkeypatch.setattr(programs, "_kept", {})
    monkeypatch.setattr(programs, "LIMIT", 3)
    made = []

    def ask(key):
        return programs.keep(("net", key), lambda: made.append(key) or len(made))

    assert [ask(key) for key in (1, 2, 1, 3, 2)] == [1, 2, 1, 3, 2] and made == [1, 2, 3]
    assert ask(4) == 4 and ask(1) == 5  # the oldest had to go
    assert ask(3) == 3
    programs.forget()
    assert ask(3) == 6


def test_a_program_is_its_makers_though_others_have_taken_its_place(monkeypatch):
    monkeypatch.setattr(programs, "_kept", {})
    monkeypatch.setattr(programs, "LIMIT", 1)
    assert programs.keep("outer", lambda: programs.keep("inner", lambda: 1) + 1) == 2
    assert programs.keep("inner", lambda: 3) == 3  # it had to go


def test_threads_that_ask_at_once_get_the_same_program(monkeypatch):
    monkeypatch.setattr(programs, "_kept", {})
    both = threading.Barrier(2)

    def make():
        both.wait(60)  # each has found none
        return object()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: programs.keep("key", make), range(2))
    assert first is second
