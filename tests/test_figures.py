"""Figures: the numbers behind them against what is known, the command, and what each draws."""

import functools
import json
import shutil
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxnets
from jaxnets import compare_page, config_file, loop, optim, plots, settings, summary
from jaxnets.errors import UserError
from jaxnets.figures import __main__ as command
from jaxnets.figures import (
    bottleneck_ablation,
    cost_breakdown,
    recipe_knobs,
    recipe_parts,
    relu_collapse,
    shuffle_ablation,
    training,
    width_tradeoff,
)
from jaxnets.figures.options import Options
from jaxnets.models import layers, mobilenet_v2
from tests.slow import slow_after
from tests.test_compare import SMALL
from tests.tiny_net import diverging_at, registered

pytestmark = pytest.mark.usefixtures("undrawn")

POINTS = relu_collapse.spiral()


def test_what_no_coordinate_clips_comes_back_exactly():
    """Positive entries and points of the first quadrant: ReLU changes nothing."""
    points = np.abs(POINTS)
    matrix = np.random.default_rng(0).uniform(0.1, 1, (5, 2))
    np.testing.assert_allclose(relu_collapse.reconstruct(points, matrix), points, atol=1e-12)


def test_what_all_coordinates_clip_is_lost():
    points = -np.abs(POINTS)
    found = relu_collapse.reconstruct(points, np.ones((4, 2)) + np.eye(4, 2))
    assert np.abs(found).max() == 0
    assert relu_collapse.relative_error(points, found) == 1.0
    assert relu_collapse.relative_error(points, relu_collapse.scaled(points, found)) == 1.0


def test_a_matrix_beside_its_negative_brings_half_back():
    """ReLU(y) - ReLU(-y) = y, so that T over -T gives exactly x / 2, and scaling all of it."""
    matrix = np.random.default_rng(1).standard_normal((3, 2))
    found = relu_collapse.reconstruct(POINTS, np.concatenate([matrix, -matrix]))
    np.testing.assert_allclose(found, POINTS / 2, atol=1e-12)
    assert relu_collapse.relative_error(POINTS, found) == pytest.approx(0.5)
    assert relu_collapse.relative_error(POINTS, relu_collapse.scaled(POINTS, found)) == pytest.approx(0, abs=1e-12)


@given(st.integers(2, 12), st.integers(0, 2**16))
def test_no_scale_is_better_than_the_best(dimensions, seed):
    random = np.random.default_rng(seed)
    found = relu_collapse.reconstruct(POINTS, random.standard_normal((dimensions, 2)))
    best = relu_collapse.relative_error(POINTS, relu_collapse.scaled(POINTS, found))
    assert all(
        best <= relu_collapse.relative_error(POINTS, found * factor) + 1e-9 for factor in random.uniform(0, 4, 9)
    )


def test_the_error_falls_with_the_dimensions(monkeypatch, tmp_path):
    monkeypatch.setattr(relu_collapse, "DRAWS", 60)
    data = relu_collapse.measure(Options(tmp_path))
    assert list(data["panels"]) == ["2", "3", "5", "15", "30"]
    middle = {point["n"]: point["scaled_error"][1] for point in data["sweep"]}
    assert middle[2] > middle[5] > middle[15] > middle[60]
    assert data["sweep"][-1]["error"][1] == pytest.approx(0.5, abs=0.05)
    with plots.style():
        figure = relu_collapse.draw(json.loads(json.dumps(data)))
    assert len(figure.axes) == 7


def test_earlier_times_are_kept(sketched, monkeypatch, tmp_path):
    monkeypatch.setattr(cost_breakdown, "layer_times", lambda layers, batch_size: [1.0] * len(layers))
    for ms in (30.0, 40.0):
        monkeypatch.setattr(cost_breakdown.latency, "measure", lambda *args, ms=ms, **kwargs: {"ms": ms})
        command.make("cost_breakdown", Options(tmp_path))
    kept = {path.name: json.loads(path.read_text())["whole_ms"] for path in tmp_path.glob("*.json")}
    assert kept == {"cost_breakdown.json": 40.0, "cost_breakdown.1.json": 30.0}
    assert (tmp_path / "cost_breakdown.1.png").exists()


def test_the_costs_of_mobilenet_v1_are_the_papers(monkeypatch):
    monkeypatch.setattr(cost_breakdown, "layer_times", lambda layers, batch_size: [1.0] * len(layers))
    monkeypatch.setattr(cost_breakdown.latency, "measure", lambda *args, **kwargs: {"ms": 30.0})
    data = cost_breakdown.measure(Options(None))
    np.testing.assert_allclose(data["shares"]["kernels"], data["paper"]["kernels"], atol=0.006)
    ours, paper = np.asarray(data["shares"]["macs"]), np.asarray(data["paper"]["macs"])
    np.testing.assert_allclose(ours[[0, 1, 3]], paper[[0, 1, 3]], atol=0.006)
    assert ours[2] == pytest.approx(1.91, abs=0.006) and ours.sum() == pytest.approx(100)
    assert data["shares"]["time"] == pytest.approx([100 * n / 28 for n in (13, 13, 1, 1)])
    with plots.style():
        figure = cost_breakdown.draw(json.loads(json.dumps(data)))
    bars = [bar.get_width() for bar in figure.axes[0].patches]
    paper_macs = sum(data["paper"]["macs"])  # as printed there
    widths = [sum(bars[at : at + 4]) for at in range(0, 20, 4)]
    assert widths == pytest.approx([100, 100, paper_macs, 100, 100], abs=0.02)
    assert len(bars) == 20 and paper_macs == pytest.approx(99.29)


def test_a_layer_alone_is_the_layer_of_the_net():
    """Same kernel and same output as in the net, for every layer."""
    model = jaxnets.create_model("mobilenet_v1", width=0.25)
    for layer in cost_breakdown.layers_of(model, 32):
        if layer.kind == "batch_norm":
            continue
        module, arguments = cost_breakdown.layer_module(layer)
        shapes = jax.eval_shape(
            lambda m=module, a=arguments, s=layer.input_shape: m.init_with_output(
                jax.random.key(0), jnp.ones((2, *s)), **a
            )
        )
        assert shapes[0].shape == (2, *layer.output_shape)
        assert layer.shape in [leaf.shape for leaf in jax.tree.leaves(shapes[1]["params"])]


@pytest.fixture(scope="module")
def small(repository, digits_dir):
    """Arguments with which a figure's nets are trained in seconds, on `tiny`; their comparison has an empty page."""
    with registered(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_page, "html", lambda comparison: "")
        yield [f"--config={repository}/configs/digits.py", f"--config.data_dir={digits_dir}", *SMALL]


@pytest.fixture
def untrained(monkeypatch):
    """Runs that leave the records of a run, and train nothing."""

    def train(config, directory):
        directory.mkdir(parents=True)
        settings.write(config, directory / "config.json")
        records = []
        for epoch in range(1, config.num_epochs + 1):
            at = {"step": 5 * epoch, "epoch": epoch}
            records.append(at | {"loss": 1.0, "accuracy": 0.5, "images_per_second": 80.0})
            accuracy = (epoch + config.seed / 10) / 4
            records.append(at | {"eval_loss": 1.0, "eval_accuracy": accuracy, "num_examples": 48})
        (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    monkeypatch.setattr(loop, "train", train)


@pytest.fixture
def sketched(monkeypatch):
    """Figures that are there and show nothing: a second each."""

    def save(figure, path):
        for file in plots.files_of(path):
            file.touch()
        return plots.files_of(path)

    monkeypatch.setattr(plots, "save", save)


def run(name, out, small, drawn=True):
    command.main(["figures", name, f"--out={out}", *small])
    data = json.loads((out / f"{name}.json").read_text())
    if not drawn:
        return data
    assert (out / f"{name}.png").stat().st_size > 5_000 and (out / f"{name}.pdf").read_bytes()[:5] == b"%PDF-"
    return data


@pytest.mark.usefixtures("untrained")
def test_shuffle_ablation(small, tmp_path, monkeypatch, capsys, request):
    def specs(groups):
        return [f"tiny:width={groups}", f"tiny:width={groups}:dropout=0.1"][:groups]

    monkeypatch.setattr(shuffle_ablation, "KNOBS", {"g1": 1, "g2": 2})
    monkeypatch.setattr(shuffle_ablation, "specs", specs)
    data = run("shuffle_ablation", tmp_path, ["--seeds=1", "--note=a small copy", *small])
    one, two = data["groups"]
    assert one["no_shuffle"] is None and two["no_shuffle"]["label"] == "tiny:width=2:dropout=0.1"
    assert two["shuffle"]["accuracy"]["n"] == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["figure"] == "shuffle_ablation" and len(result["files"]) == 3
    assert "3 runs of 2 epochs on digits train[:160] at 16 px" in result["compute"]
    assert result["compute"].endswith("; a small copy")
    # Of the same runs; the figure of all of them is kept.
    request.getfixturevalue("sketched")
    data = run("shuffle_ablation", tmp_path, ["--only=g2", "--seeds=1", *small], drawn=False)
    assert data["groups"] == [two]
    assert len(json.loads((tmp_path / "shuffle_ablation.1.json").read_text())["groups"]) == 2


def test_the_shuffle_ablation_trains_the_papers_nets():
    assert shuffle_ablation.specs(1) == ["shufflenet_v1_g1_cifar:width=0.5"]
    assert shuffle_ablation.specs(8) == [f"shufflenet_v1_g8_cifar:width=0.5{end}" for end in ("", ":shuffle=False")]


def test_gains_of_the_shuffle_are_of_pairs_of_runs():
    """Their mean and its standard error, whatever the seeds are; an unpaired run has no gain."""

    def net(**accuracies):
        values = accuracies.values()
        curves = [[[1, 0.1], [2, value]] for value in values]
        accuracy = {"mean": sum(values) / len(values), "std": 0.1}
        return {"seeds": [int(seed[1:]) for seed in accuracies], "curves": curves, "accuracy": accuracy, "macs": 1e6}

    shuffled = net(s0=0.50, s1=0.60, s2=0.73)
    groups = [
        {"groups": 2, "shuffle": shuffled, "no_shuffle": net(s1=0.58, s0=0.49, s2=0.70)},  # 1, 2 and 3 points
        {"groups": 3, "shuffle": shuffled, "no_shuffle": net(s0=0.58, s1=0.49, s2=0.70, s3=0.70)},
        {"groups": 4, "shuffle": shuffled, "no_shuffle": net(s0=0.58, s1=0.49)},
    ]
    data = {"groups": groups, "width": 0.5, "seeds": 4, "compute": "nothing"}
    with plots.style():
        (axes,) = shuffle_ablation.draw(data).axes
    assert [text.get_text() for text in axes.texts] == ["+2.0 ± 0.6", "", ""]


def interrupt(config, directory):
    raise KeyboardInterrupt


def test_a_figure_whose_runs_are_gone_is_kept(small, untrained, sketched, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(width_tradeoff, "FAMILIES", {"one": ("tiny", "tiny:width=2")})
    first = run("width_tradeoff", tmp_path, ["--seeds=2", *small], drawn=False)
    run("width_tradeoff", tmp_path, ["--seeds=2", *small], drawn=False)
    assert not list(tmp_path.glob("*.1.*"))
    shutil.rmtree(tmp_path / "width_tradeoff")
    train = loop.train
    monkeypatch.setattr(loop, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("width_tradeoff", tmp_path, ["--seeds=1", *small], drawn=False)
    monkeypatch.setattr(loop, "train", train)
    second = run("width_tradeoff", tmp_path, ["--seeds=1", *small], drawn=False)
    assert (first["seeds"], second["seeds"]) == (2, 1)
    assert json.loads((tmp_path / "width_tradeoff.1.json").read_text()) == first
    assert "width_tradeoff.json was made from runs that no longer exist: it is kept as width_trad" in caplog.text
    shutil.rmtree(next((tmp_path / "width_tradeoff" / "runs").iterdir()))  # one net's
    run("width_tradeoff", tmp_path, ["--seeds=1", *small], drawn=False)
    assert json.loads((tmp_path / "width_tradeoff.2.json").read_text()) == second


def test_bottleneck_ablation(small, untrained, tmp_path, monkeypatch):
    nets = {name: f"tiny:dropout=0.{at}" for at, name in enumerate(bottleneck_ablation.NETS, start=1)}
    monkeypatch.setattr(bottleneck_ablation, "NETS", nets)
    data = run("bottleneck_ablation", tmp_path, small)
    assert list(data["nets"]) == ["linear", "nonlinear", "expansions", "none"]
    for net in data["nets"].values():
        # By seed and evaluation: the epoch and the accuracy.
        assert net["curves"] == [[[1, 0.25], [2, 0.5]], [[1, 0.275], [2, 0.525]]]


def test_width_tradeoff(small, untrained, tmp_path, monkeypatch):
    families = {"one": ("tiny", "tiny:width=2"), "other": ("tiny:activation=relu6",)}
    monkeypatch.setattr(width_tradeoff, "FAMILIES", families)
    data = run("width_tradeoff", tmp_path, small)
    assert [len(nets) for nets in data["families"].values()] == [2, 1]
    assert all(net["macs"] > 0 and net["accuracy"]["n"] == 2 for nets in data["families"].values() for net in nets)


@pytest.mark.parametrize(
    ("overrides", "rates"),
    slow_after(
        1, [((), (0.005, 0.02)), (("--config.optimizer.name=sgd", "--config.optimizer.learning_rate=0.1"), (0.01, 0.1))]
    ),
)
def test_only_nets_without_batch_norm_have_a_rate_of_their_own(overrides, rates):
    normalised, found = {}, set()
    for entry in width_tradeoff.entries(Options(None, overrides=overrides)):
        name = entry.config.model.name
        if name not in normalised:  # of every width alike
            model = settings.make_model(entry.config, 10)
            with jaxnets.ops.using("reference"):
                shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
            normalised[name] = "batch_stats" in shapes
        found.add((normalised[name], entry.config.optimizer.learning_rate))
    assert sorted(found) == [(False, pytest.approx(rates[0])), (True, pytest.approx(rates[1]))]


def test_recipe_knobs(small, untrained, tmp_path, monkeypatch, request):
    monkeypatch.setattr(recipe_knobs, "NET", "tiny")
    monkeypatch.setattr(recipe_knobs, "KNOBS", {"longer": ("num_epochs=3",), "smoother": ("label_smoothing=0.1",)})
    data = run("recipe_knobs", tmp_path, small)
    assert data["base"]["accuracy"]["mean"] == pytest.approx((0.5 + 0.525) / 2)
    longer, smoother = data["knobs"]
    assert (longer["label"], longer["gains"]) == ("longer", pytest.approx([0.25, 0.25]))
    assert smoother["gains"] == [0.0, 0.0]
    # Of the same runs; the figure of all of them is kept.
    request.getfixturevalue("sketched")
    data = run("recipe_knobs", tmp_path, ["--only=smoother", *small], drawn=False)
    assert [knob["label"] for knob in data["knobs"]] == ["smoother"]
    kept = json.loads((tmp_path / "recipe_knobs.1.json").read_text())
    assert [knob["label"] for knob in kept["knobs"]] == ["longer", "smoother"]
    run("recipe_knobs", tmp_path, small, drawn=False)
    assert not (tmp_path / "recipe_knobs.2.json").exists()
    # Of runs that are gone, in part: kept once.
    shutil.rmtree(tmp_path / "recipe_knobs" / "runs" / "longer")
    run("recipe_knobs", tmp_path, ["--only=smoother", *small], drawn=False)
    assert (tmp_path / "recipe_knobs.2.json").exists() and not (tmp_path / "recipe_knobs.3.json").exists()


def test_a_knob_is_compared_seed_by_seed(tmp_path, monkeypatch):
    def comparison(entries, options):
        def net(label, accuracies):
            runs = [{"seed": seed, "curve": [{"epoch": 1, "accuracy": a}]} for seed, a in accuracies.items()]
            results = {"accuracy": {"mean": 0.5}, "train_seconds": 1.0} if runs else {}
            net = {"label": label, "model": "m", "parameters": 1, "macs": 1, "results": results, "runs": runs}
            return net | {"failed": []}

        return {"nets": [net("base", base), net("one", {1: 0.5, 2: 0.6}), net("all", {0: 0.1, 1: 0.5, 2: 0.7})]}

    monkeypatch.setattr(recipe_knobs, "entries", lambda options: [])
    monkeypatch.setattr(training, "run", comparison)
    monkeypatch.setattr(training, "compute", lambda comparison: "")
    base = {1: 0.4, 2: 0.5}
    one, all_seeds = recipe_knobs.measure(Options(tmp_path))["knobs"]
    assert one["gains"] == pytest.approx([0.1, 0.1]) and all_seeds["gains"] == pytest.approx([0.1, 0.2])
    base = {0: 0.4, 2: 0.5}
    assert recipe_knobs.measure(Options(tmp_path))["knobs"][0]["gains"] == []
    base = {}
    with pytest.raises(UserError, match="no run of the base"):
        recipe_knobs.measure(Options(tmp_path))


@pytest.mark.parametrize("overrides", [(), ("--config.optimizer.learning_rate=0.05", "--config.batch_size=64")])
def test_the_rates_of_large_batches_are_scaled_from_the_bases(overrides):
    base, *knobs = (entry.config for entry in recipe_parts.entries(Options(None, overrides=overrides)))

    def rate(config):
        return (
            optim.scale_rate(config.optimizer.learning_rate, config.batch_size, config.optimizer.batch_scaling)
            / rate_of_base
        )

    rate_of_base = base.optimizer.learning_rate
    large = knobs[-3:]
    assert [config.batch_size for config in large] == [4 * base.batch_size] * 3
    assert [rate(config) for config in large] == pytest.approx([1, 2, 4])


@pytest.mark.parametrize(("figure", "count"), [(recipe_knobs, len(recipe_knobs.KNOBS)), (recipe_parts, 8)])
def test_every_knob_changes_the_base_and_can_be_trained(figure, count):
    base, *knobs = figure.entries(Options(None))
    assert len(knobs) == count
    for entry in knobs:
        settings.check(entry.config)
        assert settings.as_dict(entry.config) != settings.as_dict(base.config), entry.label


def test_recipe_parts_start_from_the_default_recipe():
    """At half the side: the hole and the borders of the crop are half as wide, and batches too."""
    entry, *_ = recipe_parts.entries(Options(None))
    base, recipe = map(settings.as_dict, (entry.config, config_file.load("configs/shufflenet_v2.py:x0_5")))
    for field in ("optimizer", "schedule", "progressive_sizes", "label_smoothing", "ema_decay"):
        assert base[field] == recipe[field]
    halved = {"batch_size": 128, "image_size": 16}
    assert {field: base[field] for field in halved} == halved == {field: recipe[field] // 2 for field in halved}
    for field in ("cutout", "crop_padding"):
        assert 2 * base["augment"][field] == recipe["augment"][field]


@pytest.mark.slow
def test_recipe_parts(small, untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_parts, "NET", "tiny")
    monkeypatch.setattr(recipe_parts, "larger_batches", lambda base: {})
    data = run("recipe_parts", tmp_path, small)
    assert [part["label"] for part in data["knobs"]] == list(recipe_parts.KNOBS) and len(data["knobs"]) == 5
    assert all(part["gains"] == [0.0, 0.0] for part in data["knobs"]) and data["net"] == "tiny"


def test_the_compute_counts_forward_and_backward_at_every_size(monkeypatch):
    counted = {12: 1e9, 18: 2e9}
    monkeypatch.setattr(summary, "summarize", lambda model, size, **fields: SimpleNamespace(macs=counted[size]))
    machine = {"device": "a machine", "num_devices": 1, "cores": 4, "operators": "native", "versions": {"jax": "1"}}
    machine["date"] = "2026-01-02"
    run = {"train_seconds": 90.0, "train_images": 1000, "machines": [machine]}
    config = {"num_epochs": 4, "image_size": 24, "progressive_sizes": [0.5, 0.5, 0.75, 1.0]}
    facts = {"dataset": "d\udce9", "train_split": "t", "eval_split": "e"}
    net = {"label": "a", "config": config, "model": "m", "fields": {}, "image_size": 24, "macs": 4e9}
    nets = [net | {"runs": [run, run], "failed": ["seed 1: it diverged"]}]
    line = training.compute(facts | {"nets": nets, "note": ""})
    assert line.startswith("2 runs of 4 epochs on d\ufffd t at 24 px: 12.0 T MACs, 3.0 min of training")
    assert line.endswith("; a machine, 4 CPU cores, JAX 1, native operators (from 2026-01-02); not finished: a")
    assert training.compute(facts | {"nets": nets, "note": "a copy"}) == f"{line}; a copy"


def test_a_single_seed_has_no_whisker():
    one, two = {"mean": 0.5, "std": None}, {"mean": 0.5, "std": 0.01}
    assert training.whiskers([one, one]) is None and training.whiskers([]) is None
    np.testing.assert_equal(training.whiskers([one, two]), [np.nan, 1.0])


def test_a_figure_without_a_run_that_failed_is_drawn_and_told(small, untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "train", diverging_at(2, loop.train))
    monkeypatch.setattr(width_tradeoff, "FAMILIES", {"one": ("tiny", "tiny:width=2")})
    with pytest.raises(UserError, match="^failed: tiny:width=2, seed 0: the loss became nan; and 1 more$"):
        run("width_tradeoff", tmp_path, small)
    assert "; not finished: tiny:width=2" in json.loads(capsys.readouterr().out.splitlines()[-1])["compute"]
    assert (tmp_path / "width_tradeoff.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing", "--out=x"], "invalid choice: 'nothing'"),
        (["relu_collapse"], "--out"),
        (["relu_collapse", "--out=x", "--config.num_epochs=1"], "trains no net"),
        (["cost_breakdown", "--out=x", "--seeds=3"], "trains no net"),
        (["cost_breakdown", "--out=x", "--note=a copy"], "trains no net"),
        (["width_tradeoff", "--out=x", "--seeds=0"], "argument --seeds: '0' is not a whole number of at least 1"),
        (["width_tradeoff", "--out=x", "--epochs=1"], "unexpected argument"),
        (["width_tradeoff", "--out=x", "--only=ema_decay=0.99"], "width_tradeoff has no knobs"),
        (["relu_collapse", "--out=x", "--only=ema_decay=0.99"], "trains no net"),
        (["recipe_knobs", "--out=x", "--only=ema_decay"], "no 'ema_decay'; there are ema_decay=0.99, "),
        (["recipe_parts", "--out=x", "--only=batch"], "no 'batch'; there are optimizer.name=sgd, .*, batch 512, "),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, says):
    with pytest.raises(UserError, match=says):
        command.main(["figures", *arguments])


def test_a_file_that_is_no_figure_of_ours_is_not_overwritten(tmp_path, monkeypatch):
    for mine in ("relu_collapse.pdf", "relu_collapse.json"):
        (tmp_path / mine).write_text("[]")
        with pytest.raises(UserError, match=f"{mine} exists, but relu_collapse.json holds no jaxnets.figures data"):
            command.main(["figures", "relu_collapse", f"--out={tmp_path}"])
        assert (tmp_path / mine).read_text() == "[]"
        (tmp_path / mine).unlink()
    (tmp_path / "relu_collapse.json").write_text('{"compute": "of an older one"}')
    command.check_out(tmp_path / "relu_collapse.json", [])


@pytest.mark.parametrize(
    ("typo", "says"),
    [
        ("--config=configs/digits.py", "--config is given twice"),
        ("--config.num_epoch=1", "no field num_epoch"),
        ("--config.init_from=nothing.pth", "there is no such file or workdir"),
        ("--config.train_split=no_such", "split 'no_such' of digits does not exist"),
    ],
)
def test_a_typo_leaves_no_folder(typo, says, small, tmp_path, monkeypatch):
    monkeypatch.setattr(bottleneck_ablation, "NETS", {"linear": "tiny"})
    with pytest.raises(UserError, match=says):
        command.main(["figures", "bottleneck_ablation", f"--out={tmp_path / 'out'}", *small, typo])
    assert not (tmp_path / "out").exists()


def test_outside_a_checkout_a_configuration_has_to_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no configs/default.py here: run it from the jaxnets checkout, or name a conf"):
        command.main(["figures", "width_tradeoff", "--out=out"])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out=.*file cannot be made a folder: File exists"):
        command.main(["figures", "relu_collapse", f"--out={tmp_path / 'file'}"])


@functools.cache
def traced(name, **fields):
    """A net's parameters by their shapes, and what it computes; nothing is computed."""
    model = jaxnets.create_model(name, num_classes=3, width=0.25, **fields)
    images = jnp.zeros((2, 16, 16, 3))
    with jaxnets.ops.using("reference"):  # the fastest to trace
        variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
        computation = str(jax.make_jaxpr(partial(model.apply, train=False))(variables, images))
    return jax.tree.map(jnp.shape, variables), computation


@pytest.mark.parametrize(("shortcut", "expansion"), [("identity", 1), ("expansions", 6), ("none", None)])
def test_figure_6s_shortcuts_are_equally_many(monkeypatch, shortcut, expansion):
    added = []
    monkeypatch.setattr(mobilenet_v2, "add", lambda *args: added.append(args[0].shape[-1]) or layers.add(*args))
    model = jaxnets.create_model("mobilenet_v2_cifar", shortcut=shortcut)
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    of_the_paper = [c for _, c, n, _ in mobilenet_v2.TABLE for _ in range(n - 1)]
    assert len(of_the_paper) == 10
    assert added == ([expansion * c for c in of_the_paper] if expansion else [])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("mobilenet_v2_cifar", "bottleneck", "nonlinear"),
        ("mobilenet_v2_cifar", "shortcut", "none"),
        ("mobilenet_v2_cifar", "shortcut", "expansions"),
        ("shufflenet_v1_g2_cifar", "shuffle", False),
    ],
)
def test_an_ablation_changes_what_a_net_computes_and_not_its_weights(name, field, value):
    fields = {"shortcut": "identity"} if name == "mobilenet_v2_cifar" else {}
    (weights, computation), (other_weights, other) = traced(name, **fields), traced(name, **fields | {field: value})
    assert weights == other_weights and computation != other


def test_an_ablation_is_refused_where_it_is_unknown():
    for name, field in (("mobilenet_v2", {"bottleneck": "relu"}), ("shufflenet_v1_g3", {"shuffle": "no"})):
        with pytest.raises(UserError, match=next(iter(field))):
            jaxnets.create_model(name, **field)


@pytest.mark.parametrize(("bottleneck", "negative"), [("linear", True), ("nonlinear", False)])
def test_a_non_linear_bottleneck_is_never_negative(bottleneck, negative):
    conv_bn = partial(layers.ConvBN, activation="relu6")
    block = mobilenet_v2.InvertedResidual(4, 6, 1, "none", conv_bn, bottleneck=bottleneck)
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 4))
    (y, expanded), _ = jax.jit(partial(block.init_with_output, train=False))(jax.random.key(0), x)
    assert jnp.asarray(expanded).shape == (2, 4, 4, 24)
    assert bool((jnp.asarray(y) < 0).any()) == negative
