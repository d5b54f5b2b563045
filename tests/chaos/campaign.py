"""What the campaigns share: how many cases from which seed, what came of them, and the line they end with."""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from typing import Any, NoReturn


def arguments(description: str, count: int) -> argparse.Namespace:
    """`--count` and `--seed` of a campaign's command."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@dataclasses.dataclass
class Tally:
    """The outcomes of a campaign by kind, and what was found wrong."""

    outcomes: Counter = dataclasses.field(default_factory=Counter)
    findings: list[str] = dataclasses.field(default_factory=list)

    def add(self, kind: str, outcome: str) -> None:
        """A case that ended as it should."""
        self.outcomes[f"{kind}: {outcome}"] += 1

    def add_finding(self, kind: str, what: str) -> None:
        """A case that did not, told at once."""
        self.outcomes[f"{kind}: finding"] += 1
        self.findings.append(what)
        print(what, file=sys.stderr, flush=True)

    def end(self, args: argparse.Namespace, **figures: Any) -> NoReturn:
        """Print one JSON object, and exit with status 1 if anything was found."""
        total = vars(args) | figures | {"outcomes": dict(sorted(self.outcomes.items())), "findings": self.findings}
        print(json.dumps(total))
        sys.exit(1 if self.findings else 0)
