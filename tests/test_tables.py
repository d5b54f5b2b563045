"""Tables keep every cell, on any terminal and as Markdown."""

from jaxnets.tables import Section, markdown, print_section

LONG = "a_name_that_is_longer_than_any_terminal_is_wide_" * 3
SECTION = Section("Title [1]", ("net", "time (ms)"), [("[b]one[/b]", "1.5"), (LONG, "20.0")], 1, footer="and a footer")


def test_markdown_has_the_text_to_the_left_and_numbers_to_the_right():
    title, table, footer = markdown(SECTION).split("\n\n")
    assert (title, footer) == ("**Title [1]**", "and a footer")
    assert table.splitlines() == [
        "| net | time (ms) |",
        "| --- | ---: |",
        "| [b]one[/b] | 1.5 |",
        f"| {LONG} | 20.0 |",
    ]


def test_a_bar_in_a_cell_ends_no_cell_in_markdown():
    table = markdown(Section("", ("a|b", "n"), [("c|d", "1")], 1))
    assert table.splitlines() == ["| a\\|b | n |", "| --- | ---: |", "| c\\|d | 1 |"]


def test_a_long_name_is_folded_and_never_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_section(SECTION)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[0] == "Title [1]" and lines[-1] == "and a footer" and any("[b]one[/b]" in line for line in lines)
    first = next(at for at, line in enumerate(lines) if line.startswith("a_name"))
    assert "".join(line.split()[0] for line in lines[first:-2] if line.split()) == LONG
    assert lines[first].endswith("20.0")
