"""Figures as files and as elements of a page."""

import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from jaxnets import plots


def make_figure():
    with plots.style():
        figure = plots.new_figure(3, 2)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=plots.COLOURS[0], label="a line")
        axes.set_xlabel("across")
        figure.legend()
        plots.footnote(figure, "word " * 100)
    return figure


@pytest.fixture
def figure():
    return make_figure()


def test_files_are_made_at_the_size_asked_for_and_alike(figure, tmp_path):
    files = plots.save(figure, tmp_path / "name")
    assert [file.name for file in files] == ["name.png", "name.pdf"]
    assert Image.open(files[0]).size == (3 * plots.DPI, 2 * plots.DPI)
    before = [file.read_bytes() for file in files]
    plots.save(make_figure(), tmp_path / "name")
    assert [file.read_bytes() for file in files] == before


def test_a_name_with_a_dot_keeps_it(figure, tmp_path):
    assert plots.save(figure, tmp_path / "width_0.5")[0].name == "width_0.5.png"


def test_an_inline_figure_takes_the_colour_of_the_text_around_it(figure):
    svg = plots.inline_svg(figure, "Accuracy & cost")
    root = ElementTree.fromstring(svg)  # well formed
    assert root.get("aria-label") == "Accuracy & cost" and root.get("width") is None
    assert "currentColor" in svg and plots.INK not in svg
    assert f"var(--series-0, {plots.COLOURS[0]})" in svg
    assert "across" in "".join(root.itertext())  # text that can be found
    assert "font-size: 9px" in svg and not re.search(r"DejaVu|font-family|font:", svg)


def test_a_figure_that_the_page_describes_says_nothing_itself(figure):
    svg = plots.inline_svg(figure, "One", colours={plots.COLOURS[0]: "var(--line)"}, described=True)
    root = ElementTree.fromstring(svg)
    assert root.get("aria-hidden") == "true" and root.get("aria-label") is None and root.get("style") is None
    assert "var(--line)" in svg and plots.COLOURS[0].lower() not in svg and plots.INK in svg


def test_two_inline_figures_share_no_id_that_is_referred_to(figure):
    referred = []
    for name in ("one", "two"):
        svg = plots.inline_svg(figure, name)
        ids = set(re.findall(r'\bid="([^"]+)"', svg))
        targets = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
        assert targets and targets <= ids
        referred.append(targets)
    assert not referred[0] & referred[1]
