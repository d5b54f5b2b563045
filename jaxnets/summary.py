"""Print a net layer by layer: output shape, parameters, multiply-accumulates (MACs), activation memory.

Only layers with weights are counted. MACs: kernel height x width x input channels / groups x output channels x
output height x width for a convolution, inputs x outputs for a dense layer; none for biases, BatchNorm,
activations or pooling. This is how the papers count, at 224x224 for ImageNet; SqueezeNet 1.0's 819 M are also at 224,
while its authors' 227 gives 833 M. Activation memory: the outputs of convolutions and dense layers, float32, for
one image; a BatchNorm belongs to the convolution before it. Nothing is computed, only traced.
"""

from jaxnets import interruption

if __name__ == "__main__":
    interruption.end_quietly()

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxnets import create_model, list_models
from jaxnets.arguments import field
from jaxnets.errors import ArgumentParser, UserError, exit_on_user_error
from jaxnets.layer_list import Layer, layers_of
from jaxnets.models import default_image_size
from jaxnets.tables import Section, markdown, print_section

FLOAT_BYTES = 4
MAX_IMAGE_SIZE = 1 << 15
FORMATS = ("table", "json", "markdown")


class Row(NamedTuple):
    """One convolution with its BatchNorm, or one dense layer."""

    layer: str  # path of its module
    kind: str
    output_shape: tuple[int, ...]  # (H, W, C), or (C,)
    parameters: int
    macs: int
    activation_bytes: int


class Pair(NamedTuple):
    """A depthwise-separable convolution and the standard one that it replaces (1704.04861, section 3.1)."""

    depthwise: str
    pointwise: str
    kernel_size: int
    features: int
    macs: int
    standard_macs: int

    @property
    def ratio(self) -> float:
        """1 / N + 1 / k^2 for N features and a k x k kernel; 1 / N + 1 / (g k^2) with g groups in the pointwise."""
        return self.macs / self.standard_macs


@dataclass(frozen=True)
class Summary:
    """What a net costs for one image."""

    model: str
    fields: dict[str, Any]  # of the model, where they differ from its own
    image_size: int
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def activation_bytes(self) -> int:
        return sum(row.activation_bytes for row in self.rows)

    @property
    def peak(self) -> Row:
        """The row with the largest output."""
        return max(self.rows, key=lambda row: row.activation_bytes)

    def totals(self) -> dict[str, Any]:
        """The numbers of the whole net, for JSON."""
        return {
            "model": self.model,
            "fields": self.fields,
            "image_size": self.image_size,
            "parameters": self.parameters,
            "macs": self.macs,
            "activation_bytes": self.activation_bytes,
            "peak_layer": self.peak.layer,
            "peak_activation_bytes": self.peak.activation_bytes,
        }

    def as_dict(self) -> dict[str, Any]:
        """`totals` with the rows and pairs, for JSON."""
        pairs = [pair._asdict() | {"ratio": pair.ratio} for pair in self.pairs]
        return self.totals() | {"layers": [row._asdict() for row in self.rows], "separable_pairs": pairs}


def summarize(name: str, image_size: int | None = None, /, **fields) -> Summary:
    """Count the layers of `create_model(name, **fields)` for one image with sides of `image_size` pixels.

    `image_size=None` is the size that the net is designed for. Raises UserError for a bad name, field or size.
    """
    if image_size is None:
        image_size = default_image_size(name)
    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise UserError(f"image_size={image_size} must be from 1 to {MAX_IMAGE_SIZE} pixels")
    model = create_model(name, **fields)
    try:
        layers = layers_of(model, image_size)
    except UserError as error:
        raise UserError(f"{name} at image_size={image_size}: {error}") from None
    weighted = [layer for layer in layers if layer.kind != "batch_norm"]
    norms = {layer.path: after for layer, after in zip(layers, layers[1:]) if layer.normalised}
    rows = tuple(_row(layer, norms.get(layer.path)) for layer in weighted)
    pairs = tuple(_pair(first, second) for first, second in zip(weighted, weighted[1:]) if _is_separable(first, second))
    return Summary(name, fields, image_size, rows, pairs)


def _row(layer: Layer, norm: Layer | None) -> Row:
    parameters = math.prod(layer.shape) + (layer.shape[-1] if layer.use_bias else 0)
    if norm is not None:
        parameters += 2 * norm.shape[-1]  # scale and bias
    activation_bytes = FLOAT_BYTES * math.prod(layer.output_shape)
    return Row(_name(layer), _kind(layer), layer.output_shape, parameters, _macs(layer), activation_bytes)


def _name(layer: Layer) -> str:
    """The layer's path; for a convolution in a `ConvBN`, that of the `ConvBN`."""
    return ".".join(layer.path[:-1] if layer.normalised and layer.path[-1] == "conv" else layer.path)


def _groups(layer: Layer) -> int:
    return layer.input_shape[-1] // layer.shape[-2]


def _is_depthwise(layer: Layer) -> bool:
    single = layer.kind == "conv" and 1 < _groups(layer) == layer.input_shape[-1]
    return single and layer.shape[:2] != (1, 1)  # otherwise a grouped 1x1 with as many groups as channels


def _is_separable(first: Layer, second: Layer) -> bool:
    """Whether a depthwise convolution is followed by a 1x1 convolution of its output."""
    pointwise = second.kind == "conv" and second.shape[:2] == (1, 1) and not _is_depthwise(second)
    return _is_depthwise(first) and pointwise and second.input_shape == first.output_shape


def _kind(layer: Layer) -> str:
    if layer.kind == "dense":
        return "dense"
    size = f"{layer.shape[0]}x{layer.shape[1]}"
    if _is_depthwise(layer):
        return f"depthwise {size}"
    return f"conv {size}" + (f" g={_groups(layer)}" if _groups(layer) > 1 else "")


def _macs(layer: Layer) -> int:
    return math.prod(layer.shape) * math.prod(layer.output_shape[:-1])


def _pair(depthwise: Layer, pointwise: Layer) -> Pair:
    k, channels, features = depthwise.shape[0], depthwise.input_shape[-1], pointwise.shape[-1]
    standard = k * k * channels * features * math.prod(depthwise.output_shape[:-1])
    macs = _macs(depthwise) + _macs(pointwise)
    return Pair(_name(depthwise), _name(pointwise), k, features, macs, standard)


def sections(summary: Summary) -> list[Section]:
    """The layers with their totals and, where there are any, the depthwise-separable pairs."""
    fields = "".join(f", {name}={value}" for name, value in summary.fields.items())
    layers = Section(
        f"{summary.model}{fields}, {summary.image_size}x{summary.image_size} pixels",
        ("layer", "kind", "output", "parameters", "MACs (M)", "memory (KiB)"),
        [
            (row.layer, row.kind, "x".join(map(str, row.output_shape)), f"{row.parameters:,}", _millions(row.macs))
            + (_kib(row.activation_bytes),)
            for row in summary.rows
        ],
        text_columns=3,
        footer=(
            f"{summary.parameters:,} parameters, {_millions(summary.macs)} M MACs, "
            f"{_mib(summary.activation_bytes)} MiB of activations, "
            f"at most {_mib(summary.peak.activation_bytes)} MiB of them from one layer, {summary.peak.layer}."
        ),
    )
    return [layers, _pair_section(summary.pairs)] if summary.pairs else [layers]


def _pair_section(pairs: Sequence[Pair]) -> Section:
    macs, standard = sum(pair.macs for pair in pairs), sum(pair.standard_macs for pair in pairs)
    return Section(
        "Depthwise-separable pairs and the standard convolutions they replace",
        ("depthwise + pointwise", "k", "N", "MACs (M)", "standard (M)", "ratio"),
        [
            (_joined(pair), str(pair.kernel_size), str(pair.features), _millions(pair.macs))
            + (_millions(pair.standard_macs), f"{pair.ratio:.4f}")
            for pair in pairs
        ],
        text_columns=1,
        footer=(
            f"All {len(pairs)} pairs: {_millions(macs)} M instead of {_millions(standard)} M MACs, "
            f"a ratio of {macs / standard:.4f}. For one pair it is 1/N + 1/k^2 (with g groups in the pointwise "
            "convolution, 1/N + 1/(g k^2))."
        ),
    )


def _joined(pair: Pair) -> str:
    """Both names, with their common module once: `block0.depthwise + pointwise`."""
    block, _, name = pair.pointwise.rpartition(".")
    return f"{pair.depthwise} + {name if pair.depthwise.rpartition('.')[0] == block else pair.pointwise}"


def overview(summaries: Sequence[Summary]) -> Section:
    """One row per net."""
    return Section(
        "",
        ("model", "image", "parameters", "MACs (M)", "activations (MiB)", "largest (MiB)"),
        [
            (s.model, str(s.image_size), f"{s.parameters:,}", _millions(s.macs), _mib(s.activation_bytes))
            + (_mib(s.peak.activation_bytes),)
            for s in summaries
        ],
        text_columns=1,
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}"


def _kib(count: int) -> str:
    return f"{count / 1024:,.1f}"


def _mib(count: int) -> str:
    return f"{count / 1024**2:,.2f}"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m jaxnets.summary", description=__doc__)
    parser.add_argument("model", nargs="?", metavar="NAME", help="a net of jaxnets.list_models()")
    parser.add_argument("--all", action="store_true", help="one row for every net instead")
    parser.add_argument("--image_size", type=int, help="side in pixels; default: 224, and 32 for CIFAR nets")
    parser.add_argument("--width", type=float, help="channel multiplier; default: the net's own")
    parser.add_argument("--num_classes", type=int, help="outputs of the classifier; 0: none; default: the net's own")
    parser.add_argument(
        "--field", type=field, action="append", metavar="NAME=VALUE", help="another field, e.g. shortcut=identity"
    )
    parser.add_argument("--format", choices=FORMATS, default="table", help="json is one object on one line")
    return parser


def main(argv: list[str]) -> None:
    """Run the command."""
    args = _parser().parse_args(argv[1:])
    if bool(args.model) == args.all:
        raise UserError("give the NAME of one net, or --all")
    fields = {"width": args.width, "num_classes": args.num_classes}
    fields = {name: value for name, value in fields.items() if value is not None} | dict(args.field or [])
    names = list_models() if args.all else [args.model]
    summaries = [summarize(name, args.image_size, **fields) for name in names]
    if args.format == "json":
        print(json.dumps({"models": [s.totals() for s in summaries]} if args.all else summaries[0].as_dict()))
        return
    shown = [overview(summaries)] if args.all else sections(summaries[0])
    for position, section in enumerate(shown):
        if position:
            print()
        if args.format == "markdown":
            print(markdown(section))
        else:
            print_section(section)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and a GPU may be busy
    exit_on_user_error(main)(sys.argv)
