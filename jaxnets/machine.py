"""Where numbers were measured: the machine and the versions, to accompany every one of them."""

import datetime
import functools
import hashlib
import json
import logging
import platform
from importlib import metadata
from pathlib import Path

import jax

from jaxnets import cores, ops
from jaxnets.errors import UserError, writing
from jaxnets.plain_files import parse_json, read_text, replacing, set_aside

FILE = "machines.json"
MAX_BYTES = 1 << 20
PACKAGES = ("jax", "jaxlib", "flax", "optax")
OPERATORS = Path(ops.__file__).parent
CPUINFO = Path("/proc/cpuinfo")
# Vector instructions by processor flag on Linux, widest first: a virtual machine's processor name does not tell them.
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}

logger = logging.getLogger(__name__)


def describe(*packages: str) -> dict[str, object]:
    """The devices of all processes, the cores that this one may use, and the versions, for JSON.

    `packages`: further ones whose versions are included.
    """
    devices, counting = jax.devices(), (*PACKAGES, *packages)
    versions = {"python": platform.python_version(), "jaxnets": f"{metadata.version('jaxnets')}+{_operators_digest()}"}
    return {
        "device": _processor() if devices[0].platform == "cpu" else devices[0].device_kind,
        "num_devices": len(devices),
        "cores": cores.count(),
        "operators": ops.formulation(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions | {name: metadata.version(name) for name in counting},
    }


@functools.cache
def _operators_digest() -> str:
    """A digest of the operators' sources, which decide how fast a net is and change within a version."""
    files = sorted(path for path in OPERATORS.rglob("*") if path.suffix in (".py", ".cc", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


def sentence(machine: dict[str, object]) -> str:
    """A machine, as `describe` gives it, in one line; with PyTorch's version if that was among the packages."""
    count = f"{machine['num_devices']} x " if machine["num_devices"] > 1 else ""
    versions = machine["versions"]
    where = f"{count}{machine['device']}, {machine['cores']} CPU cores"
    if "torch" in versions:
        return f"{where}, PyTorch {versions['torch']}"
    return f"{where}, JAX {versions['jax']}, {machine['operators']} operators"


def dated_sentence(machine: dict[str, object]) -> str:
    """The sentence of a machine from `read`, with the day on which a run began there."""
    return f"{sentence(machine)} (from {machine['date']})"


def note(workdir: Path, at: int, *packages: str, **facts: str) -> None:
    """Record in a workdir where, and with what further facts, its run is trained from today and step `at` on.

    Machines that began at that step or after it are forgotten: nothing that they did was saved. An unreadable file
    becomes `machines.1.json`.
    """
    before, here = read(workdir), describe(*packages) | facts
    found = [where for where in before if where.get("step", 0) < at]  # without a step: from before 2026-12
    if not found or found[-1] | here != found[-1]:
        found.append({"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "step": at} | here)
    if found == before:
        return
    with writing(workdir):
        if not before and (moved := set_aside([workdir / FILE])):
            logger.warning("%s cannot be read, and is kept as %s", workdir / FILE, moved[0].name)
        with replacing(workdir / FILE) as scratch:
            scratch.write_text(json.dumps(found, indent=1) + "\n")


def read(workdir: Path) -> list[dict[str, object]]:
    """What `note` wrote, in order: each machine as `describe` gives it, with its first day and step; [] for nothing."""
    try:
        found = list(parse_json(read_text(workdir / FILE, MAX_BYTES)))
        for where in found:
            dated_sentence(where)
            datetime.date.fromisoformat(where["date"])
            if not isinstance(where.get("step", 0), int):
                raise TypeError
    except (FileNotFoundError, UserError, ValueError, TypeError, KeyError):
        return []
    return found


def processor_ticks() -> tuple[int, int]:
    """Ticks since boot, summed over the cores: busy, and stolen by the host of a virtual machine.

    (0, 0) if the system does not tell.
    """
    try:
        first_line, _ = Path("/proc/stat").read_text().split("\n", 1)
    except OSError:
        return 0, 0
    user, nice, system, _, _, irq, softirq, stolen = map(int, first_line.split()[1:9])
    return user + nice + system + irq + softirq, stolen


def _processor() -> str:
    """The processor's name and vector instructions, as far as the system tells."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = (fields.get("flags") or fields.get("features") or "").split()
    vectors = next((vectors for flag, vectors in VECTORS.items() if flag in flags), None)
    return f"{name} ({vectors})" if vectors else name
