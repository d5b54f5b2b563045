"""Programs are made once for equal keys, and not kept forever."""

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
