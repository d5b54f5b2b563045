"""What a figure may be asked to do otherwise."""

import dataclasses
from pathlib import Path

from jaxnets.compare_entries import DEFAULT

SEEDS = 2  # of each net, where nobody says how many


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the runs of a figure go, and how the nets are trained in place of the figure's own small setting."""

    out: Path
    seeds: int = SEEDS
    config: str = DEFAULT
    overrides: tuple[str, ...] = ()  # `--config.FIELD=VALUE`
    only: tuple[str, ...] = ()  # labels of the knobs to be turned; none: all
    note: str = ""  # a few words below the figure, on the data perhaps
    command: str = "python -m jaxnets.figures"  # as it was given
    files: tuple[Path, ...] = ()  # what is made of the runs
