"""What a figure may be asked to do otherwise."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the runs of a figure go, and how the nets are trained in place of the figure's own small setting."""

    out: Path
    seeds: int = 2
    config: str = "configs/default.py"
    overrides: tuple[str, ...] = ()  # `--config.FIELD=VALUE`
    command: str = "python -m jaxnets.figures"  # as it was given
