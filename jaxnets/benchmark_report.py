"""What the benchmark measured, as tables."""

from typing import Any

from jaxnets import tables
from jaxnets.tables import Section

MIB = 1024**2


def sections(record: dict[str, Any]) -> list[Section]:
    """The tables of speed, of the cost of starting and of memory, and of the distance to the floor."""
    return [speed(record), costs(record), floors(record)]


def speed(record: dict[str, Any]) -> Section:
    """One row per race and contender: the time of a step on both sides, and their ratio."""
    rows = []
    for race in record["races"]:
        ours = race["contenders"]["jaxnets"]
        for name, ratio in race["ratios"].items():
            theirs = race["contenders"][name]
            batch = f"{race['batch_size']}x{race['image_size']}px"
            steps = (_ms(entry["step_seconds"]["median"]) for entry in (ours, theirs))
            spread = f"{ratio['low']:.2f}-{ratio['high']:.2f}"
            rows.append((race["model"], race["mode"], batch, name, *steps, f"{ratio['median']:.2f}", spread))
    header = "net", "mode", "batch", "against", "jaxnets (ms)", "theirs (ms)", "ratio", "spread"
    stolen = max(race["stolen"] for race in record["races"])
    host = f"The host took away up to {stolen:.0%} of a race's processor time. " if stolen >= 0.005 else ""
    return Section(
        "Speed: time per step, and how many times as fast jaxnets is",
        header,
        rows,
        text_columns=4,
        footer=(
            f"Medians of {record['rounds']} rounds, and the ratio's lowest and highest round. {host}"
            f"{conditions(record)}"
        ),
    )


def costs(record: dict[str, Any]) -> Section:
    """One row per race and contender: compiling, the first step, memory."""
    rows = []
    for race in record["races"]:
        for name, entry in race["contenders"].items():
            on_device = entry["device_peak_bytes"]
            peak = on_device if on_device is not None else entry["peak_bytes"] - entry["idle_bytes"]
            cells = f"{entry['compile_seconds']:.1f}", f"{entry['first_step_seconds']:.1f}"
            steps = "" if on_device is not None else _mib(entry["peak_bytes"] - entry["ready_bytes"])
            cells += ("" if entry["temp_bytes"] is None else _mib(entry["temp_bytes"])), steps, _mib(peak)
            rows.append((race["model"], race["mode"], name, entry["form"], *cells))
    return Section(
        "Start and memory",
        (
            "net",
            "mode",
            "contender",
            "form",
            "compile (s)",
            "first step (s)",
            "temp (MiB)",
            "steps (MiB)",
            "peak (MiB)",
        ),
        rows,
        text_columns=4,
        footer=(
            "The first step includes compiling. temp: what XLA plans beyond arguments and results. steps: peak "
            "resident memory while racing, minus weights, momenta and compiled programs. peak: minus only what was "
            "there before the net was made, so it includes what compiling left behind; on a GPU, peak GPU memory, for "
            "JAX including compilation, for PyTorch since its form was chosen."
        ),
    )


def floors(record: dict[str, Any]) -> Section:
    """One row per race: what a step must move and compute, compared with jaxnets."""
    rows = []
    for race in record["races"]:
        floor, ours = race["floor"], race["contenders"]["jaxnets"]["step_seconds"]["median"]
        cells = f"{floor['bytes'] / MIB:,.0f}", f"{floor['flops'] / 1e9:,.1f}"
        cells += _ms(floor["memory_seconds"]), _ms(floor["compute_seconds"])
        rows.append((race["model"], race["mode"], *cells, _ms(ours), f"{floor['share']:.0%}"))
    rates = record["rates"]
    return Section(
        "The floor: what must be moved and computed, and how close jaxnets is",
        ("net", "mode", "moved (MiB)", "GFLOP", "memory (ms)", "matrices (ms)", "jaxnets (ms)", "floor (%)"),
        rows,
        text_columns=2,
        footer=(
            f"Measured in this run: copies at {rates['copy_bytes_per_second'] / 1e9:,.1f} GB/s (read and written), "
            f"matrix products at {rates['flops_per_second'] / 1e9:,.0f} GFLOP/s."
        ),
    )


def conditions(record: dict[str, Any]) -> str:
    """The machine, the versions and the date, in a sentence."""
    names = [name for name in ("jax", "torch") if name in record["versions"]]
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in names)
    environment = _assignments(record["environment"])
    if any(name.startswith("torch") for race in record["races"] for name in race["ratios"]):
        given = record.get("contender_environments", {}).get("torch", {})  # which takes precedence over `environment`
        own = {name: value for name, value in record["environment"].items() if name not in given}
        environment = _assignments(own) + (", PyTorch with" + _assignments(given)[1:] if given else "")
    return f"{record['device']}, {record['cores']} CPU cores, {versions}{environment}; {record['date'][:10]}."


def _assignments(environment: dict[str, str]) -> str:
    return "".join(f", {name}={value}" for name, value in environment.items())


def show(record: dict[str, Any], *, markdown: bool) -> None:
    """Print the tables."""
    for position, section in enumerate(sections(record)):
        if position:
            print()
        print(tables.markdown(section)) if markdown else tables.print_section(section)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f}"
