"""Where the parameters, multiply-accumulates and time of MobileNetV1 go (1704.04861, table 2)."""

import math
from typing import Any

import flax.linen as nn
import jax
from matplotlib.figure import Figure

from jaxnets import create_model, latency, machine, plots, summary
from jaxnets.figures.options import Options
from jaxnets.layer_list import Layer, layers_of
from jaxnets.models.layers import ConvBN

TRAINS = False
TIMES = True  # so an earlier figure cannot be made again, on another machine or with other operators
MODEL, IMAGE_SIZE, BATCH_SIZE = "mobilenet_v1", 224, 8
KINDS = ("1x1", "depthwise 3x3", "stem 3x3", "classifier")
# Table 2, per cent. It counts only kernels. Its MACs add up to 99.29; with 1.91 for the stem they would make 100.
PAPER = {"macs": (94.86, 3.06, 1.19, 0.18), "kernels": (74.59, 1.06, 0.02, 24.33)}


def kind_of(row: summary.Row) -> str:
    """The row of the paper's table that a layer belongs to."""
    return {"conv 1x1": "1x1", "depthwise 3x3": "depthwise 3x3", "conv 3x3": "stem 3x3", "dense": "classifier"}[
        row.kind
    ]


def layer_module(layer: Layer) -> tuple[nn.Module, dict[str, Any]]:
    """A layer on its own, a convolution with its BatchNorm and ReLU, and the arguments to call it with."""
    if layer.kind == "dense":
        return nn.Dense(layer.shape[-1]), {}
    module = ConvBN(
        layer.shape[-1],
        layer.shape[0],
        math.ceil(layer.input_shape[0] / layer.output_shape[0]),
        feature_group_count=layer.input_shape[-1] // layer.shape[-2],
        activation="relu",
    )
    return module, {"train": False}


def layer_times(layers: list[Layer], batch_size: int) -> list[float]:
    """Milliseconds of each layer for a batch, minus those of a call that does nothing."""
    idle = float(sorted(latency.call_times(jax.jit(lambda: 0).lower().compile()))[0]) * 1e3
    known: dict[tuple, float] = {}
    times = []
    for layer in layers:
        key = (layer.kind, layer.shape, layer.input_shape, layer.output_shape)
        if key not in known:
            module, arguments = layer_module(layer)
            known[key] = max(latency.measure(module, (batch_size, *layer.input_shape), **arguments)["ms"] - idle, 0.0)
        times.append(known[key])
    return times


def measure(options: Options) -> dict[str, Any]:
    """The shares of kernel parameters, MACs and time, in per cent, by kind of layer, with the paper's."""
    model = create_model(MODEL)
    rows = summary.summarize(MODEL, IMAGE_SIZE).rows
    layers = [layer for layer in layers_of(model, IMAGE_SIZE) if layer.kind != "batch_norm"]
    times = layer_times(layers, BATCH_SIZE)
    whole = latency.measure(model, (BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3), train=False)["ms"]
    kernels = [math.prod(layer.shape) for layer in layers]
    amounts = {"kernels": kernels, "macs": [row.macs for row in rows], "time": times}
    shares = {
        what: [
            100 * sum(value for value, row in zip(values, rows) if kind_of(row) == kind) / sum(values) for kind in KINDS
        ]
        for what, values in amounts.items()
    }
    return {
        "model": MODEL,
        "image_size": IMAGE_SIZE,
        "batch_size": BATCH_SIZE,
        "kinds": list(KINDS),
        "shares": shares,
        "paper": PAPER,
        "kernel_parameters": sum(kernels),
        "macs": sum(amounts["macs"]),
        "layers_ms": sum(times),
        "whole_ms": whole,
        "layers": [row._asdict() | {"ms": ms, "group": kind_of(row)} for row, ms in zip(rows, times)],
        "compute": (
            f"{MODEL} at {IMAGE_SIZE} px, batch {BATCH_SIZE}, forward pass; layers timed alone, each with its "
            f"BatchNorm and ReLU: {sum(times):.1f} ms together, the whole net {whole:.1f} ms; "
            + machine.sentence(machine.describe())
        ),
    }


def columns(data: dict[str, Any]) -> dict[str, list[float]]:
    """The shares as they are drawn and printed, the paper's next to ours."""
    shares, paper = data["shares"], data["paper"]
    return {
        "parameters, paper": list(paper["kernels"]),
        "parameters": shares["kernels"],
        "MACs, paper": list(paper["macs"]),
        "MACs": shares["macs"],
        "time": shares["time"],
    }


def draw(data: dict[str, Any]) -> Figure:
    """A stacked bar for each of `columns`, and a table of their numbers."""
    figure = plots.new_figure(7.0, 3.3)
    axes, below = figure.subplots(2, 1, height_ratios=(1.35, 1))
    shown = columns(data)
    for row, shares in enumerate(shown.values()):
        left = 0.0
        for index, share in enumerate(shares):
            label = data["kinds"][index] if row == 0 else None
            axes.barh(row, share, left=left, height=0.72, color=plots.COLOURS[index], label=label)
            if share >= 6:
                axes.text(left + share / 2, row, f"{share:.1f}", ha="center", va="center", color="white", fontsize=8)
            left += share
    axes.set_yticks(range(len(shown)), list(shown))
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share (%)")
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=len(KINDS), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    below.axis("off")
    cells = [[f"{shares[index]:.2f}" for shares in shown.values()] for index in range(len(KINDS))]
    table = below.table(
        cells, rowLabels=data["kinds"], colLabels=list(shown), loc="center", edges="horizontal", cellLoc="center"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(7.5)
    for cell in table.get_celld().values():
        cell.set(linewidth=0.4, edgecolor=plots.INK)
    plots.footnote(figure, data["compute"])
    return figure
