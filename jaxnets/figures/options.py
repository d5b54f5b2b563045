"""The options of a figure."""

import dataclasses
from pathlib import Path

from jaxnets.compare_entries import DEFAULT

SEEDS = 2  # per net, by default


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the runs of a figure go, and what overrides the figure's own small setting in training."""

    out: Path
    seeds: int = SEEDS
    config: str = DEFAULT
    overrides: tuple[str, ...] = ()  # `--config.FIELD=VALUE`
    only: tuple[str, ...] = ()  # labels of the knobs to try; none: all
    note: str = ""  # a few words below the figure, perhaps on the data
    command: str = "python -m jaxnets.figures"  # as it was given
    files: tuple[Path, ...] = ()  # files that are made from the runs
