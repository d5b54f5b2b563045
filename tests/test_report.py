"""The page of a run: what it says, that it needs nothing else, trusts no file, and harms no run."""

import base64
import html.parser
import io
import itertools
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxnets import charts, journal, predictions, report, timing
from jaxnets.errors import UserError
from tests import chromium
from tests.slow import slow_after

NAMES = ("cat", "dog", "<b>&")
VOID = {"meta", "input", "img", "br", "wbr", "link"}


class Page(html.parser.HTMLParser):
    """A page taken apart: its elements with their attributes, its text, and whether every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.text += text + " "

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def make_run(workdir, names=NAMES, seed=0, **fields):
    """A workdir as a run of three epochs of ten steps leaves it; the net is mostly right. `seed` is its mistakes'."""
    workdir.mkdir()
    config = {"model": {"name": "tiny", "width": None}, "dataset": "pets", "num_epochs": 3, "batch_size": 32}
    (workdir / "config.json").write_text(json.dumps(config | {"augment": {"flip": True}} | fields))
    records = []
    for epoch in (1, 2, 3):
        at = {"step": 10 * epoch, "epoch": epoch}
        train = {"loss": 2.0 / epoch, "accuracy": 0.2 * epoch, "learning_rate": 0.1 / epoch, "images_per_second": 9e9}
        records += [at | train, at | {"eval_loss": 1.5 / epoch, "eval_accuracy": (0.5, 0.875, 0.75)[epoch - 1]}]
    (workdir / journal.FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    phases = {"train": 3.0, "wait for data": 1.0, "evaluate": 1.0}
    spans = [
        {"first": s, "last": s + 10, "seconds": phases | {"compile": 45.0} if s == 0 else phases} for s in (0, 10, 20)
    ]
    (workdir / timing.FILE).write_text("\n".join(map(json.dumps, spans)))
    label = np.arange(60, dtype=np.int32) % len(names)
    predicted = label.copy()
    predicted[3:9] = (predicted[3:9] + 1) % len(names)  # of each class two, where there are three
    predicted[0] = 1
    probability = np.full(60, 0.8, np.float32)
    of_label = np.where(predicted == label, 0.8, 0.1).astype(np.float32)
    of_label[0] = 0.0001
    mistakes = np.flatnonzero(predicted != label)[:4]
    images = np.random.default_rng(seed).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    content = predictions.Evaluated(
        np.int64(30), np.array(names), label, predicted, probability, of_label, mistakes, images
    )
    np.savez(workdir / predictions.FILE, **vars(content))
    return workdir


def with_average(workdir, accuracy):
    """The run, whose averaged weights have that accuracy in every evaluation."""
    records = journal.read(workdir)
    for record in records:
        if "eval_accuracy" in record:
            record |= {"ema_eval_accuracy": accuracy, "ema_eval_loss": 0.1}
    (workdir / journal.FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    return workdir


@pytest.fixture
def workdir(tmp_path):
    return make_run(tmp_path / "first")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run with its page."""
    workdir = make_run(tmp_path_factory.mktemp("drawn") / "first")
    report.write([workdir])
    return workdir


@pytest.fixture
def sketched(monkeypatch):
    """No curves, for tests of other parts of a page: most of a second."""
    monkeypatch.setattr(charts, "draw_curves", lambda *_, **__: "<svg></svg>")


def page_of(*workdirs, out=None):
    path = report.write([Path(w) for w in workdirs], out)
    return Page(path.read_text())


def test_the_page_of_a_run_says_how_it_went(drawn):
    page = Page((drawn / report.FILE).read_text())
    for text in ("first", "tiny, on pets", "3 epochs", "87.50%", "after epoch 2", "75.00%", "0.5000", "augment.flip"):
        assert text in page.text
    # 320 images in 4 seconds of training, whatever single reports say; 45 + 3 * 5 seconds in all.
    assert re.search(r"throughput\s+80\b", page.text) and "1 min 0 s" in page.text
    assert re.search(r"compile\s+45 s\s+75.0%", page.text)
    assert page.all("h1") and len(page.all("h2")) == 4


def test_the_curves_are_drawn_over_steps_and_time_and_described(drawn):
    descriptions = [figure["aria-label"] for figure in Page((drawn / report.FILE).read_text()).all("figure")]
    titles = ("Loss", "Accuracy", "Learning rate", "Images per second, training")
    assert [d.split(" over ")[0] for d in descriptions] == [*titles, *titles]
    assert descriptions[0] == "Loss over step: training from 2 to 0.6667; evaluation from 1.5 to 0.5"
    assert descriptions[4].startswith("Loss over seconds")


def test_the_curve_goes_through_the_numbers(drawn):
    """The points of the evaluation's accuracy, read back from the drawing."""
    svg = re.findall(r"<svg.*?</svg>", (drawn / report.FILE).read_text(), re.DOTALL)
    accuracy = next(s for s in svg if 'id="accuracy-step-figure_1"' in s)
    points = re.search(r'd="M ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+) "[^>]*var\(--series-1\)',
                       accuracy.replace("\n", ""))  # fmt: skip
    x0, y0, x1, y1, x2, y2 = map(float, points.groups())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=1e-3)
    assert (y1 - y0) / (y2 - y1) == pytest.approx((0.875 - 0.5) / (0.75 - 0.875), rel=1e-3)


def test_the_mistakes_are_counted_and_shown(drawn):
    page = Page((drawn / report.FILE).read_text())
    # Of each class 20; 17 of the cats are found, and 2 others taken for cats.
    assert re.search(r"cat\s+20\s+85.0%\s+89.5%\s+dog \(15.0%\)", page.text)
    assert "7 wrong among 60" in page.text
    images = page.all("img")
    assert [image["alt"] for image in images][0] == "cat, taken for dog" and len(images) == 4
    assert "<0.1%" in page.text
    shown = Image.open(io.BytesIO(base64.b64decode(images[0]["src"].removeprefix("data:image/png;base64,"))))
    np.testing.assert_array_equal(np.asarray(shown), predictions.load(drawn).images[0])
    headers = [cell for cell in page.all("th") if cell.get("scope") == "row"]
    assert len(headers) >= 6


def test_the_page_is_one_file_that_asks_for_nothing(drawn):
    page = Page((drawn / report.FILE).read_text())
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    links = [attributes.get(name) for _, attributes in page.elements for name in ("src", "href", "xlink:href")]
    assert all(link.startswith(("data:", "#")) for link in links if link)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {link[1:] for link in links if link and link.startswith("#")}
    assert targets and targets <= set(ids)


def test_the_colours_are_the_pages(drawn):
    text = (drawn / report.FILE).read_text()
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--series-1)" in drawn and not re.findall(r"#[0-9a-f]{6}\b", drawn)
    used, defined = set(re.findall(r"var\(--([\w-]+)\)", text)), set(re.findall(r"--([\w-]+):", text))
    assert used <= defined


EVIL = '<script>alert("x")</script>$x_{$'


def test_nothing_in_a_file_becomes_markup(tmp_path):
    workdir = make_run(tmp_path / "run <i>&", names=(EVIL, "'\"><img src=x>", "{{ 7 * 7 }}"), note=EVIL, dataset=EVIL)
    page = page_of(workdir)
    assert not page.all("script") and not page.all("i")
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert EVIL in page.text and "{{ 7 * 7 }}" in page.text and "run <i>&" in page.text


@pytest.mark.usefixtures("sketched")
def test_names_that_are_not_utf_8_are_shown_with_a_replacement(tmp_path, capsys):
    """A folder's in Latin-1, as Python reads it, and a lone surrogate, which JSON may hold."""
    many = [f"class {number}" for number in range(30)]
    runs = [make_run(tmp_path / "caf\udce9", names=("th\udce9", "b", "c"), dataset="\ud800")]
    runs.append(make_run(tmp_path / "other\udce9", names=many))
    for run in runs:
        report.main(["report", f"--workdir={run}"])
    assert capsys.readouterr().out.splitlines()[0].endswith("/caf\ufffd/report.html")
    text = Page((runs[0] / "report.html").read_text()).text
    assert "caf\ufffd" in text and "th\ufffd" in text and "on \ufffd;" in text
    report.main(["report", *map(str, runs), f"--out={tmp_path / 'both.html'}"])


@pytest.mark.usefixtures("sketched")
def test_several_runs_are_compared_on_shared_axes(tmp_path, monkeypatch):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", augment={"flip": False})
    monkeypatch.chdir(tmp_path)
    page = page_of(one, other)
    assert (tmp_path / "comparison.html").is_file() and not (one / "report.html").exists()
    assert "2 runs compared" in page.text
    assert re.search(r"augment.flip\s+True\s+False", page.text)
    charts = [figure["aria-label"] for figure in page.all("figure")]
    assert len(charts) == 8 and all("one, " in chart and "other, " in chart for chart in charts)
    assert re.search(r"cat\s+85.0%\s+85.0%", page.text)
    assert len(page.all("img")) == 8


@pytest.mark.usefixtures("sketched")
def test_a_number_that_one_run_lacks_leaves_its_place_empty(tmp_path):
    plain, averaged = make_run(tmp_path / "plain"), with_average(make_run(tmp_path / "averaged"), 0.9)
    (plain / timing.FILE).unlink()
    for runs in ((plain, averaged), (averaged, plain)):
        page = report.render([report.load(run, run.name) for run in runs])
        table = re.search(r"<h2>Results</h2>.*?</table>", page, re.DOTALL)[0]
        header, *rows = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:])
        rows = [[re.sub("<small>.*", "", cell) for cell in row] for row in rows]
        cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
        assert (cells["plain"]["last accuracy"], cells["averaged"]["last accuracy"]) == ("75.00%", "90.00%")
        assert (cells["plain"]["last loss"], cells["averaged"]["last loss"]) == ("0.5000", "0.1000")
        assert (cells["plain"]["unaveraged weights"], cells["averaged"]["unaveraged weights"]) == ("–", "75.00%")
        assert cells["plain"]["time"] == "–" and cells["averaged"]["time"] == "1 min 0 s"
        assert cells["averaged"]["throughput"] == "80"


@pytest.mark.usefixtures("sketched")
def test_of_several_runs_the_averaged_weights_are_the_line_of_one_that_has_them(tmp_path):
    plain, averaged = make_run(tmp_path / "plain"), with_average(make_run(tmp_path / "averaged"), 0.25)
    page = page_of(plain, averaged, out=tmp_path / "both.html")
    described = [figure["aria-label"] for figure in page.all("figure")]
    accuracy = next(text for text in described if text.startswith("Accuracy"))
    assert "plain, evaluation from 0.5 to 0.75" in accuracy
    assert "averaged, evaluation from 0.25 to 0.25" in accuracy
    assert "averaged (averaged weights)" in page.text and "plain (averaged weights)" not in page.text


def runs_in(page):
    """Their names in the table of results."""
    table = re.search(r"<h2>Results</h2>.*?</table>", page, re.DOTALL)[0].replace("<wbr>", "")
    return [re.search(r"<t[hd][^>]*>(.*?)</t[hd]>", row)[1] for row in table.split("<tr>")[2:]]


@pytest.mark.usefixtures("sketched")
def test_runs_of_one_name_and_with_other_classes_are_told_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", names=("x", "y"))
    page = report.write([one, other], tmp_path / "both.html").read_text()
    assert runs_in(page) == [str(one), str(other)]
    assert "<h2>Accuracy by class</h2>" not in page
    third = make_run(tmp_path / "third")
    page = report.write([one, third], tmp_path / "both.html").read_text()
    assert runs_in(page) == ["run", "third"]
    assert "<h2>Accuracy by class</h2>" in page


@pytest.mark.usefixtures("sketched")
def test_the_runs_of_a_comparison_are_named_after_their_nets(tmp_path):
    for net in ("narrow", "wide"):
        (tmp_path / "runs" / net).mkdir(parents=True)
    runs = [make_run(tmp_path / "runs" / net / "seed0") for net in ("narrow", "wide")]
    assert runs_in(report.write(runs, tmp_path / "both.html").read_text()) == ["narrow/seed0", "wide/seed0"]
    assert "<h1>narrow/seed0</h1>" in report.write(runs[:1]).read_text()


@pytest.mark.usefixtures("sketched")
def test_many_classes_are_an_image_and_their_worst(tmp_path):
    names = tuple(f"class-{number}" for number in range(30))
    page = page_of(make_run(tmp_path / "run", names=names))
    assert "The other 10 classes" in page.text and not any(
        "confusion" in (table.get("class") or "") for table in page.all("table")
    )
    assert any("30 classes" in (figure["aria-label"]) for figure in page.all("figure"))


@pytest.mark.usefixtures("sketched")
def test_thousands_of_classes_are_counted_without_a_matrix(tmp_path):
    """In whole it would take 32 GB."""
    names = [f"class {number}" for number in range(1 << 16)]
    page = page_of(make_run(tmp_path / "many", names))
    assert "65536 classes, too many to draw" in page.text and "Most confused" in page.text
    assert all("classes" not in figure["aria-label"] for figure in page.all("figure"))


@pytest.mark.usefixtures("sketched")
def test_the_machines_of_a_run_are_named(workdir):
    assert "(from " not in page_of(workdir).text
    same = {"num_devices": 1, "cores": 4, "operators": "xla", "versions": {"jax": "1"}}
    machines = [{"device": name} | same for name in ("one", "<b>two")]
    dated = [machine | {"date": f"2026-01-0{day}"} for day, machine in enumerate(machines, 1)]
    (workdir / "machines.json").write_text(json.dumps(dated))
    rest = ", 4 CPU cores, JAX 1, xla operators (from 2026-01-0"
    assert f"On one{rest}1); then on <b>two{rest}2)." in page_of(workdir).text


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("missing", [timing.FILE, predictions.FILE])
def test_a_run_without_a_file_has_a_page_without_its_part(workdir, missing):
    (workdir / missing).unlink()
    page = page_of(workdir)
    assert ("Where the time went" in page.text) == (missing != timing.FILE)
    assert bool(page.all("img")) == (missing != predictions.FILE)
    assert len(page.all("figure")) == (8 if missing != timing.FILE else 3)


@pytest.mark.usefixtures("sketched")
def test_damaged_predictions_are_said_and_left_out(workdir, caplog):
    (workdir / predictions.FILE).write_bytes(b"PK\3\4 nonsense")
    assert not page_of(workdir).all("img")
    assert "cannot be read as a run's predictions" in caplog.text


def test_records_of_the_first_epoch_are_enough(workdir):
    lines = (workdir / journal.FILE).read_text().splitlines()
    (workdir / journal.FILE).write_text(lines[0] + "\n[1]\n" + '{"step": 10, "epoch": 1, "loss": NaN}\n{"step": 1')
    page = page_of(workdir)
    assert "epoch 1 of 3 so far" in page.text


@pytest.mark.usefixtures("sketched")
def test_bad_input_is_refused_and_nothing_written_over(workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    new = make_run(tmp_path / "new")
    (new / journal.FILE).unlink()
    other = make_run(tmp_path / "other")
    (other / journal.FILE).write_text('{"step": 1, "epoch": 1}\n')
    os.mkfifo(tmp_path / "pipe")
    for arguments, message in {
        (): "--workdir=DIR",
        ("--workdir=nowhere",): "nowhere is not the workdir of a run",
        ("--workdir=new",): "no records in metrics.jsonl yet",
        ("--workdir=other",): "no records in metrics.jsonl yet",
        (f"--workdir={workdir}", "--out=mine.html"): "mine.html exists and is not a page",
        (f"--workdir={workdir}", "--out=new"): "new exists and is not a page",
        (f"--workdir={workdir}", "--out=pipe"): "pipe exists and is not a page",
        (f"--workdir={workdir}", "--out=nowhere/page.html"): "cannot be written",
        (f"--workdir={workdir}", "--checkpoint=best"): "--checkpoint",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            report.main(["report", *arguments])
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    assert not (workdir / "report.html").exists()


@pytest.mark.usefixtures("sketched")
def test_the_command_takes_runs_as_a_shell_lists_them(workdir, tmp_path, capsys):
    other = make_run(tmp_path / "second")
    report.main(["report", f"--workdir={workdir}"])
    report.main(["report", f"--workdir={workdir}"])  # its own page is drawn anew
    assert capsys.readouterr().out.split() == [str(workdir / "report.html")] * 2
    for number, arguments in enumerate(([f"--workdir={workdir}", str(other)], [str(workdir), str(other)])):
        report.main(["report", *arguments, f"--out={tmp_path / f'{number}.html'}"])
        assert "2 runs compared" in (tmp_path / f"{number}.html").read_text()


def test_a_live_page_that_cannot_be_drawn_is_a_line_in_the_log(workdir, caplog):
    live = report.LivePage(workdir, split=None)  # of which no image can be read
    live.update(30, predictions.load(workdir))
    live.close()
    (message,) = {record.message for record in caplog.records}
    assert "report.html was not drawn: AttributeError" in message and "\n" not in message


def test_a_live_page_takes_a_tenth_of_the_time_and_shows_the_last_evaluation(workdir, monkeypatch):
    """Of a page that takes an hour to draw the second waits for nine, or for the end of the run."""
    began, drawn, clock = threading.Event(), [], itertools.count(step=3600)

    def draw(live, at, predicted):
        drawn.append(at)
        began.set()

    monkeypatch.setattr(report.LivePage, "_draw", draw)
    monkeypatch.setattr(report.time, "monotonic", lambda: float(next(clock)))
    live = report.LivePage(workdir, split=None)
    waits, wait = [], live._closing.wait
    monkeypatch.setattr(live._closing, "wait", lambda seconds: waits.append(seconds) or wait(seconds))
    live.update(1, None)
    assert began.wait(60)
    for at in (2, 3, 4):
        live.update(at, None)
    live.close()
    assert drawn == [1, 4]
    assert waits[1] == (2 + 9 - 3) * 3600  # it ended at 2 o'clock, and it is 3


@pytest.mark.parametrize("width", slow_after(1, [390, 1200]))
def test_the_page_fits_its_screen_and_prints(workdir, tmp_path, width):
    """In Chromium: nothing is wider than the screen, and the page prints on a few sheets."""
    page = report.write([workdir])
    assert chromium.width_of(page, width, tmp_path) <= width
    assert 1 <= chromium.sheets_of(page, tmp_path) <= 6


def test_runs_with_long_names_fit_a_phone(tmp_path):
    nets = [f"mobilenet_v2_cifar_width=0.5_activation=relu6_shortcut={name}" for name in ("identity", "projection")]
    for net in nets:
        (tmp_path / net).mkdir()
    page = report.write([make_run(tmp_path / net / "seed0") for net in nets], tmp_path / "both.html")
    assert chromium.width_of(page, 390, tmp_path) <= 390


def test_a_screen_that_is_dark_gets_dark_ground_and_light_ink(workdir, tmp_path):
    """The extremes of brightness of what is seen first, the heading on its ground, have the contrast of WCAG's AAA."""
    page = report.write([workdir])
    for dark in (False, True):
        shades = chromium.shades_of(page, tmp_path, dark)
        ground = np.bincount(shades.ravel(), minlength=256).argmax()  # most of the page
        assert (ground < 40) if dark else (ground > 215)
        assert shades.max() - shades.min() > 180
