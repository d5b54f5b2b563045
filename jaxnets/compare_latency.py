"""The latency of a comparison's nets for one image and for a batch, stored next to their runs.

Entries of the same net, for example under several recipes, share one measurement.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jaxnets
from jaxnets import latency, machine, settings, summary
from jaxnets.compare_entries import Entry, net_fields
from jaxnets.errors import writing
from jaxnets.plain_files import parse_json, read_text, replacing
from jaxnets.runtime import logger
from jaxnets.workdir import MAX_BYTES


def timed(entry: Entry, image_size: int | None, batch_size: int, num_classes: int) -> dict[str, Any]:
    """What is timed for an entry, and where: the net from `timed_net`, on one image and on `batch_size` images.

    Raises UserError for an image size that the net cannot take.
    """
    name, size, fields = timed_net(entry, image_size, num_classes)
    counted = summary.summarize(name, size, **fields)
    return {
        "model": name,
        "fields": fields,
        "image_size": size,
        "batch_size": batch_size,
        "dtype": settings.compute_dtype(entry.config.model.dtype),
        "parameters": counted.parameters,
        "macs": counted.macs,
        "machine": machine.describe(),
    }


def timed_net(entry: Entry, image_size: int | None, num_classes: int) -> tuple[str, int, dict[str, Any]]:
    """The net that is timed for an entry: its name, the side of its images, its fields.

    If `image_size` is not the run's own, this is the net made for large images, if there is one: that of the same name
    without `_cifar`.
    """
    config = entry.config
    name, size, fields = config.model.name, image_size or config.image_size, net_fields(config)
    twin = name.removesuffix("_cifar")
    if size != config.image_size and twin != name and twin in jaxnets.list_models():
        return twin, size, fields
    return name, size, fields | {"num_classes": num_classes}


def path_of(what: dict[str, Any], out: Path) -> Path:
    """The file that stores the latency of `what`."""
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return out / "runs" / f"latency-{digest[:16]}.json"


def measure(what: dict[str, Any], out: Path) -> None:
    """Time `what`, as returned by `timed`, unless it was timed before."""
    if read(what, out):
        return
    name, size, fields = what["model"], what["image_size"], what["fields"]
    net = ":".join([name, *(f"{field}={value}" for field, value in fields.items())])
    logger.info("latency of %s at %d pixels", net, size)
    model = jaxnets.create_model(name, dtype=what["dtype"], **fields)
    one, batch = (latency.measure(model, (n, size, size, 3), train=False) for n in (1, what["batch_size"]))
    path = path_of(what, out)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            scratch.write_text(json.dumps(what | {"one": one, "batch": batch}, indent=2) + "\n", encoding="utf-8")


def read(what: dict[str, Any], out: Path) -> dict[str, Any] | None:
    """The result of `measure` for `what`, or None."""
    try:
        found = parse_json(read_text(path_of(what, out), MAX_BYTES))
        same = {name: found.get(name) for name in what} == json.loads(json.dumps(what))  # which has lists for tuples
    except (FileNotFoundError, ValueError, AttributeError):  # UserError, if unreadable, is a ValueError
        return None
    return found if same and {"one", "batch"} <= found.keys() else None
