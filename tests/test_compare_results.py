"""Numbers read from a workdir, over seeds, and in tables, against what was put there by hand."""

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxnets import compare_results
from jaxnets.errors import UserError

CONFIG = ConfigDict({"seed": 4, "batch_size": 10, "num_epochs": 2, "ema_decay": 0.0})
# Two epochs of five steps, reported twice an epoch; the rates make 2, 4, 3 and 6 seconds.
RECORDS = [
    {"step": 3, "epoch": 1, "loss": 2.0, "accuracy": 0.1, "images_per_second": 15.0},
    {"step": 5, "epoch": 1, "loss": 2.0, "accuracy": 0.2, "images_per_second": 5.0},
    {"step": 5, "epoch": 1, "eval_loss": 1.0, "eval_accuracy": 0.95, "ema_eval_accuracy": 0.5, "num_examples": 7},
    {"step": 8, "epoch": 2, "loss": 2.0, "accuracy": 0.5, "images_per_second": 10.0},
    {"step": 10, "epoch": 2, "loss": 2.0, "accuracy": 1.0, "images_per_second": 20 / 6},
    {"step": 10, "epoch": 2, "eval_loss": 1.0, "eval_accuracy": 0.925, "ema_eval_accuracy": 0.9, "num_examples": 7},
]


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return tmp_path


def test_the_numbers_of_a_run(workdir):
    run = compare_results.read_run(workdir, CONFIG)
    assert run["accuracy"] == 0.925  # of the last epoch, not the best
    assert run["train_accuracy"] == pytest.approx((3 * 0.5 + 2 * 1.0) / 5)
    assert run["train_seconds"] == pytest.approx(15)
    assert run["epoch_seconds"] == pytest.approx((6 + 9) / 2)
    assert run["seconds_to"] == pytest.approx({"0.90": 6, "0.92": 6, "0.93": 6, "0.94": 6})
    assert (run["seed"], run["train_images"], run["num_examples"]) == (4, 100, 7)


def test_a_run_whose_times_cannot_be_read_is_not_called_damaged(workdir):
    (workdir / "timing.jsonl").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="timing.jsonl cannot be read: ") as error:
        compare_results.read_run(workdir, CONFIG)
    assert "delete" not in str(error.value)


def test_seconds_an_epoch_are_the_mean_of_short_and_long_ones(workdir):
    at = {"step": 15, "epoch": 3}
    train = {"loss": 1.0, "accuracy": 1.0, "images_per_second": 50 / 30}
    evaluated = {"eval_loss": 1.0, "eval_accuracy": 1.0, "num_examples": 7}
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(at | train) + "\n" + json.dumps(at | evaluated) + "\n")
    run = compare_results.read_run(workdir, ConfigDict(CONFIG.to_dict() | {"num_epochs": 3}))
    assert run["epoch_seconds"] == pytest.approx((6 + 9 + 30) / 3)


def test_seconds_are_by_the_clock_where_the_workdir_has_it_whole(workdir):
    """After an interruption in the second epoch, whose first report says little of the steps before it."""
    spans = [(0, 5, 2.0), (5, 8, 3.0), (8, 10, 4.0)]
    lines = [
        {"first": first, "last": last, "seconds": {"train": seconds, "wait for data": 0.5, "evaluate": 9, "compile": 7}}
        for first, last, seconds in spans
    ]
    (workdir / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = compare_results.read_run(workdir, CONFIG)
    assert (run["curve"][0]["seconds"], run["train_seconds"]) == pytest.approx((2.5, 10.5))
    (workdir / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    assert compare_results.read_run(workdir, CONFIG)["train_seconds"] == pytest.approx(15)


def test_averaged_weights_count_where_the_run_keeps_them(workdir):
    run = compare_results.read_run(workdir, ConfigDict(CONFIG.to_dict() | {"ema_decay": 0.9}))
    assert run["accuracy"] == 0.9
    assert run["seconds_to"]["0.90"] == pytest.approx(15) and run["seconds_to"]["0.92"] is None


def test_a_run_that_is_not_at_its_end_has_no_numbers(workdir, tmp_path):
    assert compare_results.read_run(tmp_path / "nothing", CONFIG) is None
    assert compare_results.read_run(workdir, ConfigDict(CONFIG.to_dict() | {"num_epochs": 3})) is None
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:5]))
    assert compare_results.read_run(workdir, CONFIG) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda records: records[2:3] + records[5:],  # nothing of the training
        lambda records: records[:3] + records[5:],  # nothing of the last epoch's
        lambda records: [*records[:5], records[5] | {"eval_accuracy": "x"}],
        lambda records: [*records[:5], records[5] | {"step": None}],
        lambda records: [*records[:5], records[5] | {"eval_accuracy": 10**400}],
        lambda records: [5, *records],
        lambda records: [{"loss": 1.0}, *records],
    ],
)
def test_records_that_are_none_of_a_run_are_one_sentence(workdir, spoil):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in spoil(RECORDS)))
    with pytest.raises(UserError, match=r"metrics\.jsonl (does not have the records of a run of 2 epochs|has lines)"):
        compare_results.read_run(workdir, CONFIG)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_the_spread_is_numpys(values):
    found = compare_results.spread(values)
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    assert found["min"] <= found["mean"] + 1e-12 and found["n"] == len(values)


MACHINE = {"device": "a machine", "num_devices": 1, "cores": 4, "operators": "native", "versions": {"jax": "1"}}


def make_run(accuracy, seconds):
    return {
        "accuracy": accuracy,
        "train_accuracy": accuracy,
        "final_train_accuracy": None,
        "epoch_seconds": 1.0,
        "train_seconds": 2.0,
        "seconds_to": seconds,
        "machines": [MACHINE | {"date": "2026-01-02"}],
    }


def make_net(label, runs, latency=None):
    sizes = {"label": label, "model": "m", "image_size": 32, "parameters": 1234, "macs": 5_600_000}
    sizes |= {"framework": "jaxnets", "config": {"num_epochs": 3, "augment": {"flip": False, "cutout": 0}}}
    results = compare_results.over_seeds(runs)
    return sizes | {"results": results, "latency": latency, "failed": [], "runs": runs}


def comparison_of(nets, seeds, note=""):
    splits = {"train_split": "train", "eval_split": "test", "dataset": "digits"}
    return splits | {"nets": nets, "seeds": seeds, "torch": None, "note": note}


def test_an_accuracy_that_one_seed_missed_has_no_time():
    runs = [make_run(0.93, {"0.90": 1.0, "0.92": 2.0}), make_run(0.91, {"0.90": 3.0, "0.92": None})]
    assert compare_results.over_seeds(runs)["seconds_to"] == {"0.90": 2.0, "0.92": None}
    net = make_net("a", runs)
    seconds = runs[0]["seconds_to"] | {"0.93": None, "0.94": None}
    for run in runs:
        run["seconds_to"] = seconds | run["seconds_to"]
    assert compare_results.reached([net, make_net("none", [])]) == ["0.90", "0.92"]  # one with every seed, one with one
    comparison = comparison_of([net], seeds=2)
    assert not any("No run reached" in note for note in compare_results.notes(comparison))


def test_the_notes_say_how_all_were_trained():
    """At the rate of their batch, and only what is the same for all."""
    optimizer = {"name": "sgd", "learning_rate": 0.1, "batch_scaling": "linear"}
    config = {"image_size": 32, "num_epochs": 3, "batch_size": 512, "progressive_sizes": (), "optimizer": optimizer}
    nets = [{"config": config}, {"config": config | {"num_epochs": 5}}]
    facts = {"train_split": "train", "dataset": "cifar10"}
    (said,) = compare_results._trained_alike(facts | {"nets": nets})
    assert said == "Training: train of cifar10, 32 pixels, batches of 512, sgd at 0.2; all fields: compare.json."
    nets[1]["config"] = config | {"progressive_sizes": (16, 32), "optimizer": optimizer | {"name": "muon"}}
    (said,) = compare_results._trained_alike(facts | {"nets": nets})
    assert said == "Training: train of cifar10, up to 32 pixels, 3 epochs, batches of 512; all fields: compare.json."


def test_the_notes_say_where_and_how():
    runs = [make_run(0.8, {f"{t:.2f}": None for t in compare_results.TARGETS}) for _ in range(2)]
    runs[1]["machines"] = [MACHINE | {"date": "2026-01-01"}, MACHINE | {"device": "another", "date": "2026-01-03"}]
    net = make_net("a", runs)
    comparison = comparison_of([net], seeds=2)
    found = "\n".join(compare_results.notes(comparison))
    assert "No run reached 90%." in found and "while the weights were changing." in found
    where = ", 4 CPU cores, JAX 1, native operators (from 2026-01-0"
    assert f"Trained on: 1: a machine{where}1); 2: another{where}3)." in found
    assert "average" not in found
    other = make_net("b", runs)
    other["config"]["ema_decay"] = 0.9
    said = compare_results.notes(comparison | {"nets": [net, other]})
    assert "Accuracy of b: with the weights' moving average (config.ema_decay)." in said
    assert "The nets were not trained alike: they differ in ema_decay." in said
    net["config"]["augment"]["flip"] = True
    assert "on augmented images" in "\n".join(compare_results.notes(comparison))
    assert "trained alike" not in found


def test_machines_stand_in_the_order_of_their_first_days():
    days = [("a", "2026-01-01"), ("b", "2026-01-02"), ("a", "2026-01-03")]
    runs = [make_run(0.8, {}) | {"machines": [MACHINE | {"device": name, "date": day}]} for name, day in days]
    found = compare_results.machines([make_net("net", runs)])
    assert [where.split(",")[0] for where in found] == ["a", "b"]
    assert [where[-16:] for where in found.values()] == ["from 2026-01-01)", "from 2026-01-02)"]


def test_machines_that_compute_by_other_operators_are_not_one():
    """A run without a compiler takes several times as long."""
    runs = [make_run(0.8, {}) | {"machines": [MACHINE | {"date": "2026-01-01", "operators": name}]} for name in "ab"]
    assert [where.split(", ")[-1] for where in compare_results.machines([make_net("a", runs)])] == [
        "a operators",
        "b operators",
    ]


def test_pytorch_is_named_where_it_trained():
    where = MACHINE | {"date": "2026-01-01", "versions": {"jax": "1", "torch": "2"}}
    nets = [make_net("a", [make_run(0.8, {}) | {"machines": [where, where | {"date": "2026-01-02"}]}])]
    assert compare_results.machines(nets) == {
        "a machine, 4 CPU cores, PyTorch 2": "a machine, 4 CPU cores, PyTorch 2 (from 2026-01-01)"
    }


def test_what_changes_no_result_is_no_difference():
    one, other = make_net("a", []), make_net("b", [])
    of_the_net = {"name": "vgg16_bn_cifar", "num_classes": 7}
    other["config"] = other["config"] | {"num_workers": 7, "model": of_the_net, "batch_size": 3}
    assert [name for name, _ in compare_results.recipe_differences([one, other])] == ["batch_size"]


def test_fields_of_the_net_are_differences_where_no_label_gives_them():
    def differences(*labels_and_fields):
        nets = [make_net(label, []) for label, _ in labels_and_fields]
        for net, (_, fields) in zip(nets, labels_and_fields):
            net["config"] = net["config"] | {"model": {"name": "a", "dtype": "auto", "width": None} | fields}
        return dict(compare_results.recipe_differences(nets))

    fields = {"dropout": 0.2, "dtype": "float32", "stochastic_depth": 0.1, "width": 0.5, "bn_momentum": 0.99}
    assert differences(("one", {}), ("other", fields)).keys() == {f"model.{field}" for field in fields}
    assert differences(("a:width=0.5 (PyTorch)", {"width": 0.5}), ("b", {})) == {}
    assert differences(("a:width=0.5", {"width": 0.5}), ("a:width=2:dropout=0.1", {"width": 2, "dropout": 0.1})) == {}
    told = differences(("a:width=0.5", {"width": 0.5}), ("b", {"dtype": "float32"}), ("c", {"width": 2}))
    assert told == {"model.dtype": ["auto", "float32", "auto"], "model.width": ["0.5", "–", "2"]}


@pytest.mark.parametrize(
    ("value", "said"), [(2.345, "2.35"), (999.4, "999"), (999.5, "1,000"), (999.9, "1,000"), (1234.5, "1,234")]
)
def test_milliseconds_are_said_without_an_exponent(value, said):
    assert compare_results._milliseconds(value) == said


def test_one_seed_has_no_deviation():
    assert compare_results.with_spread(compare_results.spread([0.5]), seeds=1) == "50.00"
    assert compare_results.with_spread(compare_results.spread([0.5, 0.6]), seeds=2) == "55.00 ± 7.07 (n=2)"


def test_seeds_that_failed_are_seen():
    """One left of three is no mean of three, and an accuracy that it alone reached has no time."""
    assert compare_results.with_spread(compare_results.spread([0.5]), seeds=3) == "50.00 (n=1)"
    runs = [make_run(0.93, {"0.90": 1.0, "0.92": 2.0})]
    assert compare_results.over_seeds(runs, lost=True)["seconds_to"] == {"0.90": None, "0.92": None}
    assert compare_results.over_seeds(runs)["seconds_to"] == {"0.90": 1.0, "0.92": 2.0}
    net = make_net("a", [make_run(0.8, {f"{t:.2f}": None for t in compare_results.TARGETS})])
    net["failed"] = ["seed 1: the loss became nan"]
    comparison = comparison_of([net], seeds=2)
    assert "Failed: a, seed 1: the loss became nan." in compare_results.notes(comparison)


def test_the_number_of_runs_is_said_once_unless_it_differs():
    seconds = {f"{t:.2f}": None for t in compare_results.TARGETS}
    runs = [make_run(0.5, seconds), make_run(0.6, seconds) | {"final_train_accuracy": 0.75}]
    comparison = comparison_of([make_net("a", runs), make_net("b", [])], seeds=2)
    found = compare_results.table(comparison)
    cells = dict(zip(found.header, found.rows[0]))
    assert (cells["accuracy (%)"], cells["in training (%)"]) == ("55.00 ± 7.07 (n=2)", "55.00 ± 7.07")
    assert cells["train (%)"] == "75.00 (n=1)"
    assert found.rows[1][4:] == ("-",) * 4


def test_pytorchs_version_is_that_of_the_runs():
    def of_torch(label, *versions):
        machines = [MACHINE | {"date": "2026-01-02", "versions": {"jax": "1"} | version} for version in versions]
        run = make_run(0.8, {f"{t:.2f}": None for t in compare_results.TARGETS}) | {"machines": machines}
        return make_net(label, [run]) | {"framework": "torch"}

    old, new, unknown = of_torch("a", {"torch": "2.1"}), of_torch("b", {"torch": "2.2"}), of_torch("c", {})
    assert compare_results.torch_versions([make_net("ours", []), new, old, old]) == "2.1, 2.2"
    assert compare_results.torch_versions([unknown]) == ""
    assert compare_results.torch_versions([make_net("ours", [])]) is None


def test_tables_have_a_cell_for_every_column():
    latency = {"image_size": 224, "batch_size": 8, "one": {"ms": 2.345}, "batch": {"ms": 1234.5}, "model": "m"}
    latency["machine"] = MACHINE
    nets = [
        make_net("a", [make_run(0.93, {f"{t:.2f}": 5.0 for t in compare_results.TARGETS})], latency),
        make_net("b, with a comma", []),
    ]
    comparison = comparison_of(nets, seeds=1, note="A note.")
    section = compare_results.table(comparison)
    assert {len(row) for row in section.rows} == {len(section.header)}
    cells = dict(zip(section.header, section.rows[0]))
    assert cells["epochs"] == "3" and cells["accuracy (%)"] == "93.00" and cells["s to 94%"] == "5.0"
    assert cells["1 image (ms)"] == "2.35" and cells["8 images (ms)"] == "1,234"
    rows = list(csv.DictReader(io.StringIO(compare_results.csv_text(comparison))))
    assert [row["label"] for row in rows] == ["a", "b, with a comma"]
    assert float(rows[0]["latency_batch_ms"]) == 1234.5 and rows[1]["accuracy_mean"] == ""
    assert compare_results.notes(comparison)[-1] == "A note."
