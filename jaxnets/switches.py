"""Environment variables that turn something off."""

from collections.abc import Mapping


def is_off(name: str, environment: Mapping[str, str]) -> bool:
    """Whether the variable is 0, false, no or off, in upper or lower case; if unset, nothing is off."""
    return environment.get(name, "1").lower() in ("0", "false", "no", "off")
