"""The summary: counts equal the papers', PyTorch's own and the pinned ones; the command in its three formats."""

import json
import math
import subprocess
import sys

import pytest

import jaxnets
from jaxnets import summary
from jaxnets.errors import UserError
from jaxnets.layer_list import layers_of
from tests.slow import each_once, mark_slow
from tests.test_models import PARAMETERS

PAPER_MACS = {
    "mobilenet_v1": 569e6,
    "mobilenet_v2": 301e6,
    "squeezenet1_0": 819e6,
    "squeezenet1_1": 349e6,
    "shufflenet_v1_g3": 138e6,
    "shufflenet_v2_x0_5": 40e6,
    "shufflenet_v2_x1_0": 145e6,
    "shufflenet_v2_x1_5": 296e6,
    "shufflenet_v2_x2_0": 583e6,
}


def test_all_has_every_net_at_its_own_size(capsys, monkeypatch):
    layers, traced = layers_of(jaxnets.create_model("mobilenet_v2_mini"), 32), []
    monkeypatch.setattr(summary, "layers_of", lambda model, size: traced.append(size) or layers)  # no net is traced
    models = json.loads(run(capsys, "--all", "--format=json"))["models"]
    sizes = {totals["model"]: totals["image_size"] for totals in models}
    assert list(sizes) == jaxnets.list_models() and traced == list(sizes.values())
    assert {name for name, size in sizes.items() if size == 32} == {
        name for name in sizes if name.endswith(("_cifar", "_mini"))
    }
    assert set(sizes.values()) == {32, 224}


# Those that other tests here trace too; test_models.py holds the number of every net.
TRACED = {*PAPER_MACS, "mobilenet_v1_cifar", "mobilenet_v2_mini", "resnet18_cifar", "resnet50", "vgg16"}


@pytest.mark.parametrize("name", [name if name in TRACED else mark_slow(name) for name in jaxnets.list_models()])
def test_parameters_are_the_pinned_ones(name):
    assert summary.summarize(name).parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", PAPER_MACS)
def test_macs_are_the_papers(name):
    # Whole millions in the paper: 40.5 is 40 there.
    tolerance = max(0.01, 0.5e6 / PAPER_MACS[name])
    assert summary.summarize(name).macs == pytest.approx(PAPER_MACS[name], rel=tolerance)


def count_in_torch(torch, net, size):
    """Parameters, MACs and outputs of PyTorch's convolutions and linear layers, counted by hooks."""
    macs = outputs = 0

    def count(module, _, output):
        nonlocal macs, outputs
        macs += module.weight.numel() * output[0, 0].numel()
        outputs += output.numel()

    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, size, size, device="meta"))
    return sum(p.numel() for p in net.parameters()), macs, outputs


@each_once(
    {
        "size": [224, 161],
        "name": ["mobilenet_v2", "squeezenet1_0", "squeezenet1_1", "shufflenet_v2_x1_0", "resnet50", "vgg16"],
    }
)
def test_counts_equal_pytorchs(name, size):
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        expected = count_in_torch(torch, torchvision.models.get_model(name), size)
    ours = summary.summarize(name, size)
    assert (ours.parameters, ours.macs, ours.activation_bytes / 4) == expected


def test_the_peak_is_the_largest_output():
    mobilenet = summary.summarize("mobilenet_v2")
    assert mobilenet.peak.layer == "stage1_block0.expand"
    assert mobilenet.peak.output_shape == (112, 112, 96)
    assert mobilenet.peak.activation_bytes == 112 * 112 * 96 * 4


def test_rows_stand_in_the_order_of_the_forward_pass():
    rows = summary.summarize("mobilenet_v1", width=0.25).rows
    assert len(rows) == 1 + 2 * 13 + 1
    assert [row[:3] for row in rows[:3]] == [
        ("stem", "conv 3x3", (112, 112, 8)),
        ("stage0_block0.depthwise", "depthwise 3x3", (112, 112, 8)),
        ("stage0_block0.pointwise", "conv 1x1", (112, 112, 16)),
    ]
    assert rows[-1] == ("classifier", "dense", (1000,), 257_000, 256_000, 4000)


@pytest.mark.parametrize(
    ("name", "pairs"),
    [("mobilenet_v1", 13), ("mobilenet_v2", 17), ("mobilenet_v2_mini", 4), ("shufflenet_v2_x0_5", 16 + 3)],
)
def test_every_separable_pair_costs_what_the_paper_says(name, pairs):
    found = summary.summarize(name).pairs
    assert len(found) == pairs
    for pair in found:
        assert pair.ratio == pytest.approx(1 / pair.features + 1 / pair.kernel_size**2, rel=1e-12)


def test_a_grouped_pointwise_convolution_is_cheaper_still():
    found = summary.summarize("shufflenet_v1_g4").pairs
    assert len(found) == 16
    for pair in found:
        assert pair.ratio == pytest.approx(1 / pair.features + 1 / (4 * 9), rel=1e-12)


def test_a_grouped_pointwise_convolution_of_one_channel_a_group_is_not_depthwise():
    assert len(summary.summarize("shufflenet_v1_g8", width=0.05).pairs) == 16


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18_cifar", "vgg16_bn_cifar"])
def test_other_nets_have_no_separable_pairs(name):
    assert summary.summarize(name).pairs == ()


def test_fields_and_size_reach_the_net():
    whole, narrow = summary.summarize("mobilenet_v1_cifar"), summary.summarize("mobilenet_v1_cifar", width=0.5)
    assert narrow.macs < whole.macs / 3
    small = summary.summarize("mobilenet_v1_cifar", 16)
    assert small.parameters == whole.parameters
    convolutions = [sum(row.macs for row in s.rows if row.kind != "dense") for s in (small, whole)]
    assert 4 * convolutions[0] == convolutions[1]
    assert summary.summarize("mobilenet_v1_cifar", num_classes=0).rows == whole.rows[:-1]


def test_any_field_reaches_the_net_from_the_shell(capsys):
    fields = "--field=stem_stride=2", "--field=width=0.5"
    found = json.loads(run(capsys, "mobilenet_v1_cifar", "--num_classes=7", *fields, "--format=json"))
    assert found["macs"] == summary.summarize("mobilenet_v1_cifar", num_classes=7, stem_stride=2, width=0.5).macs


def run(capsys, *arguments):
    summary.main(["summary", *arguments])
    return capsys.readouterr().out


def test_json_is_one_object_whose_parts_add_up(capsys):
    lines = run(capsys, "mobilenet_v2_mini", "--format=json").splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert result["model"] == "mobilenet_v2_mini" and result["image_size"] == 32
    for total, part in {"parameters": "parameters", "macs": "macs", "activation_bytes": "activation_bytes"}.items():
        assert result[total] == sum(layer[part] for layer in result["layers"])
    assert [math.prod(layer["output_shape"]) * 4 for layer in result["layers"]] == [
        layer["activation_bytes"] for layer in result["layers"]
    ]
    assert all(0 < pair["ratio"] < 1 for pair in result["separable_pairs"])


@pytest.mark.parametrize("name", ["shufflenet_v2_x1_0", "mobilenet_v2", "vgg16"])
def test_the_table_fits_80_columns_with_one_line_a_layer(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run(capsys, name).splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    layers = {line.split()[0]: line for line in lines[: lines.index("")] if line}
    for row in summary.summarize(name).rows:
        assert f"{row.parameters:,}" in layers[row.layer]
        assert "x".join(map(str, row.output_shape)) in layers[row.layer]


def test_a_narrow_terminal_folds_names_and_cuts_nothing(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    out = run(capsys, "shufflenet_v2_x1_0")
    assert max(map(len, out.splitlines())) <= 60 and "…" not in out
    assert "1,025,000" in out


def test_markdown_has_equal_columns_and_all_layers(capsys):
    out = run(capsys, "mobilenet_v1_cifar", "--format=markdown", "--width=0.5")
    assert out.startswith("**mobilenet_v1_cifar, width=0.5, 32x32 pixels**\n\n| layer | kind |")
    tables = [[line.count("|") for line in block.splitlines()] for block in out.split("\n\n") if block[0] == "|"]
    assert [len(table) for table in tables] == [2 + 28, 2 + 13]
    assert [set(table) for table in tables] == [{7}, {7}]


@pytest.mark.parametrize("format", ["table", "markdown"])
def test_all_is_one_row_a_net(capsys, monkeypatch, format):
    monkeypatch.setenv("COLUMNS", "80")
    names = ["mobilenet_v2_mini", "shufflenet_v2_x0_5_cifar", "vgg19_bn"]
    monkeypatch.setattr(summary, "list_models", lambda: names)
    lines = run(capsys, "--all", f"--format={format}").splitlines()
    assert max(map(len, lines)) <= 80
    found = [line.strip("| ") for line in lines if any(name in line for name in names)]
    assert [line.split()[0] for line in found] == names
    for name, line in zip(names, found):
        expected = summary.summarize(name)
        assert f"{expected.parameters:,}" in line and f"{expected.macs / 1e6:,.2f}" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mobilenet_v9"], "mobilenet_v2"),
        ([], "NAME"),
        (["vgg16", "--all"], "--all"),
        (["mobilenet_v2", "--image_size=0"], "image_size=0 must be from 1"),
        (["mobilenet_v2", "--image_size=large"], "large"),
        (["squeezenet1_0", "--image_size=5"], "squeezenet1_0 at image_size=5: the images are too small"),
        (["vgg16", "--width=-1"], "width=-1.0"),
        (["vgg16", "--num_classes=-1"], "num_classes=-1"),
        (["vgg16", "--format=xml"], "xml"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    with pytest.raises(UserError) as caught:
        summary.main(["summary", *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_fails_with_status_1(repository):
    command = [sys.executable, "-m", "jaxnets.summary", "mobilenet_v2_mini", "--width=0"]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
