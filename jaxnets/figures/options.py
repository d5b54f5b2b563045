"""The options of a figure."""

import dataclasses
from pathlib import Path
from typing import TypeVar

from jaxnets.compare_entries import DEFAULT
from jaxnets.errors import UserError

T = TypeVar("T")

SEEDS = 2  # per net, by default


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the runs of a figure go, and what overrides the figure's own small setting in training."""

    out: Path
    seeds: int = SEEDS
    config: str = DEFAULT
    overrides: tuple[str, ...] = ()  # `--config.FIELD=VALUE`
    only: tuple[str, ...] = ()  # labels of the knobs or groups to try; none: all
    note: str = ""  # a few words below the figure, perhaps on the data
    command: str = "python -m jaxnets.figures"  # as it was given
    files: tuple[Path, ...] = ()  # files that are made from the runs

    def chosen(self, found: dict[str, T]) -> dict[str, T]:
        """What `only` names of `found`, by label, or all of it; UserError for an unknown label."""
        for label in self.only:
            if label not in found:
                raise UserError(f"--only: there is no {label!r}; there are {', '.join(found)}")
        return {label: each for label, each in found.items() if not self.only or label in self.only}
