"""The page of a comparison: complete, self-contained, and safe with any name."""

import re
from html.parser import HTMLParser

import pytest

from jaxnets import compare_page, compare_results
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
    facts = {"command": "python -m jaxnets.compare", "date": "2026-01-02", "dataset": "digits"}
    return compare_page.html(facts | {"eval_split": "test", "seeds": 2, "torch": None, "note": "", "nets": nets})


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
    for shown in (NAME, "second", "81.00 ± 1.41 (n=2)", "the loss became nan", "a machine", "2026-01-02"):
        assert shown in text
    assert "b" not in tags.tags  # a name is text


def test_a_long_name_breaks_between_its_words(page):
    assert "<td>never_<wbr>finished</td>" in page


def test_it_needs_nothing_from_elsewhere(page):
    tags = Tags(page)
    assert not {"script", "link", "img", "iframe"} & set(tags.tags)
    referring = [value for name, value in tags.attributes if name in ("src", "href", "xlink:href")]
    assert referring and all(value.startswith("#") for value in referring)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_no_id_stands_twice(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_every_net_looks_its_own():
    looks = [tuple(compare_page.look(index).values()) for index in range(40)]
    assert len(set(looks)) == 40
