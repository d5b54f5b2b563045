"""The page of a comparison: complete, self-contained, and safe with any name."""

import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from jaxnets import compare_entries, compare_page, compare_results
from tests import chromium
from tests.test_compare_results import MACHINE, make_net, make_run

NAME = "<b>net & co</b>"


@pytest.fixture(scope="module")
def page():
    latency = {"image_size": 32, "batch_size": 8, "one": {"ms": 2.0}, "batch": {"ms": 9.0}, "model": "m"}
    latency["machine"] = MACHINE
    nets = []
    for label, final in ((NAME, 0.8), ("second", 0.7)):
        runs = [
            make_run(final + at / 50, {f"{t:.2f}": None for t in compare_results.TARGETS})
            | {"seed": at, "curve": [{"seconds": 1.0, "accuracy": 0.3}, {"seconds": 2.0, "accuracy": final}]}
            for at in range(2)
        ]
        nets.append(make_net(label, runs, latency))
    nets.append(make_net("never_finished", []) | {"failed": ["seed 0: the loss became nan"]})
    facts = {"command": f"compare --note='{NAME}'", "date": "2026-01-02", "dataset": NAME, "note": NAME}
    return compare_page.html(
        facts | {"train_split": "train", "eval_split": "test", "seeds": 2, "torch": None, "nets": nets}
    )


class Tags(HTMLParser):
    """The open tags, the attributes and the text of a page; fails where tags do not match."""

    VOID = ("meta", "br", "wbr")

    def __init__(self, page):
        super().__init__()
        self.open, self.attributes, self.text, self.tags = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_it_is_well_formed_and_shows_everything(page):
    tags = Tags(page)
    text = " ".join(tags.text)
    assert tags.tags.count("svg") == 3 and tags.tags.count("table") == 2
    for shown in ("second", "81.00 ± 1.41 (n=2)", "the loss became nan", "a machine", "2026-01-02"):
        assert shown in text


def test_a_run_leads_to_its_own_page(page):
    links = [value for name, value in Tags(page).attributes if name == "href" and value.startswith("runs/")]
    folders = [compare_entries.folder_of(label) for label in (NAME, "second")]
    assert links == [f"runs/{folder}/seed{seed}/report.html" for folder in folders for seed in range(2)]
    of_torch = make_net("c", [make_run(0.5, {}) | {"seed": 0, "curve": []}]) | {"framework": compare_entries.TORCH}
    assert compare_page.pages([of_torch]) == [None]


def test_nothing_in_a_record_becomes_markup(page):
    tags = Tags(page)
    assert "b" not in tags.tags
    title = f"3 nets on {NAME}, compared"
    assert tags.text.count(title) == 2
    for place in (NAME, f"'--note={NAME}'", f"Accuracy: test of {NAME}, after"):
        assert any(text.startswith(place) for text in tags.text)


def test_names_that_matplotlib_would_read_otherwise_are_in_the_legend():
    nets = [make_net(label, [make_run(0.5, {}) | {"seed": 0, "curve": []}]) for label in ("_mine", "a$x_{$b")]
    for chart in compare_page._charts(nets):
        assert "_mine</text>" in chart["svg"] and "a$x_{$b</text>" in chart["svg"]


def test_nets_of_several_recipes_and_machines_say_which_had_which():
    nets = []
    for label, device in (("a", "fast"), ("b", "slow")):
        where = [MACHINE | {"device": device, "date": "2026-01-02"}]
        runs = [make_run(0.5, {}) | {"seed": 0, "curve": [{"seconds": 1.0, "accuracy": 0.3}], "machines": where}]
        nets.append(make_net(label, runs))
    nets[1]["config"] = {"num_epochs": 7, "augment": {"flip": False, "cutout": 8}, "model": {"name": "m"}}
    assert compare_page.recipes_table(nets[:1]) is None
    recipes = compare_page.recipes_table(nets)
    assert recipes.header == ("net", "num_epochs", "augment.cutout")
    assert recipes.rows == [("a", "3", "0"), ("b", "7", "8")]
    assert [row[-1] for row in compare_page.runs_table(nets).rows] == ["1", "2"]
    assert compare_page.runs_table(nets).header[-1] == "machine"
    for net in nets:
        net["runs"] = [run | {"machines": []} for run in net["runs"]]
    assert compare_page.runs_table(nets).header[-1] == "s of training"
    assert compare_page.runs_table(nets[:1]).header[-1] == "s of training"


def test_a_long_name_breaks_between_its_words(page):
    assert '<th scope="row">never_<wbr>finished</th>' in page


@pytest.mark.parametrize("width", [390])
def test_the_page_fits_a_phone(width, tmp_path):
    """Where names and places are long words, too."""
    label = "mobilenet_v2_cifar:width=0.5:activation=relu6:shortcut=projection:bottleneck=nonlinear"
    runs = [make_run(0.5, {f"{t:.2f}": None for t in compare_results.TARGETS}) | {"seed": 0}]
    runs[0]["curve"] = [{"seconds": 1.0, "accuracy": 0.3}]
    nets = [make_net(label, runs), make_net(label + "2", []) | {"failed": ["seed 0: /a/" + "long_path" * 20]}]
    place = "folder:/a" + "/very_long_name_of_a_folder" * 4
    facts = {"command": "compare --out=" + "x" * 200, "date": "2026-01-02", "dataset": place, "note": "y" * 99}
    page = tmp_path / "compare.html"
    page.write_text(
        compare_page.html(
            facts | {"train_split": "train", "eval_split": "test", "seeds": 1, "torch": None, "nets": nets}
        )
    )
    assert chromium.width_of(page, width, tmp_path) <= width


def test_it_needs_nothing_from_elsewhere(page):
    tags = Tags(page)
    assert not {"script", "link", "img", "iframe"} & set(tags.tags)
    referring = [value for name, value in tags.attributes if name in ("src", "href", "xlink:href")]
    assert referring and all(value.startswith(("#", "runs/")) for value in referring)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_no_id_stands_twice(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_every_net_looks_its_own():
    looks = [tuple(compare_page.look(index).values()) for index in range(40)]
    assert len(set(looks)) == 40


def test_a_net_and_its_twin_in_pytorch_share_colour_and_marker_and_differ():
    runs = [make_run(0.5, {}) | {"seed": 0, "curve": [{"seconds": at, "accuracy": 0.3} for at in (1, 2)]}]
    nets = [make_net("a", runs), make_net("b", runs), make_net("b (PyTorch)", runs) | {"framework": "torch"}]
    numbers = compare_page.pair_numbers(nets)
    assert numbers == [0, 1, 1]
    axes = Figure().subplots()
    for number, net in zip(numbers, nets):
        compare_page.draw_curves(axes, number, net)
    first, ours, theirs = axes.lines
    assert first.get_color() != ours.get_color() == theirs.get_color()
    assert first.get_marker() != ours.get_marker() == theirs.get_marker()
    assert (ours.get_linestyle(), theirs.get_linestyle()) == ("-", "--")
    assert theirs.get_markerfacecolor() == "none" != ours.get_markerfacecolor()


def test_long_names_stay_within_their_chart():
    """Two beside each other would begin left of the chart, which cuts them off."""
    labels = [f"mobilenet_v2_cifar:width=0.5:activation=relu6:shortcut={name}:bottleneck=nonlinear" for name in "abcd"]
    runs = [make_run(0.5, {}) | {"seed": 0, "curve": [{"seconds": 1.0, "accuracy": 0.3}]}]
    nets = [(at, make_net(label, runs)) for at, label in enumerate(labels)]
    chart = compare_page._chart("cost", compare_page.draw_cost, nets)
    assert min(float(x) for x in re.findall(r"translate\((-?[\d.]+)", chart)) >= 0
    lines = re.findall(r">([^<>]+)</text>", chart)
    assert all(label in "".join(lines) for label in labels)
    assert max(map(len, lines)) <= compare_page.LEGEND_WIDTH


def test_curves_of_many_evaluations_keep_their_markers():
    runs = [make_run(0.5, {}) | {"curve": [{"seconds": at, "accuracy": 0.3} for at in range(60)]}]
    axes = Figure().subplots()
    for index in (0, 8):  # of one colour
        compare_page.draw_curves(axes, index, make_net("net", runs))
    one, other = axes.lines
    assert one.get_color() == other.get_color() and one.get_marker() != other.get_marker()
    assert one.get_markevery() == 3
