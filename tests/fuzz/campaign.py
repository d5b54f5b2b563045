"""Damage files of every kind for as long as asked, and count what is not read or refused as it should be.

    python -m tests.fuzz.campaign --minutes=12 --workers=2 [--targets=torch,image] [--engine=atheris]

Without --engine, each target's seeds are damaged at random (`mutate`). With atheris, which must be installed and knows
Python 3.11 to 3.13, coverage guides the damage, for the targets that are single files read by Python code. What is
found lies in --out afterwards; the last line of standard output is one JSON object with the figures. With findings,
the status is 1.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STALLED = 60  # seconds of wall clock that one file may take before its process is ended
ATHERIS = ("torch", "image", "archive", "config")
REPOSITORY = Path(__file__).resolve().parents[2]


def work(target: str, seconds: float, seed: int, out: Path) -> None:
    """One process: damage and read until the time is over. `count` in its folder says how far it has come."""
    from tests.fuzz import mutate, readers, seeds

    resource.setrlimit(resource.RLIMIT_AS, (1 << 37, 1 << 37))
    place = Path(tempfile.mkdtemp(dir=out))
    rng = random.Random(seed)
    whole = seeds.write(target, place / "seeds")
    kind = seeds.KINDS.get(target, target)
    for path in whole:  # the first imports and compilations are not the files' fault
        readers.attempt(kind, path)
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        source = rng.choice(whole)
        tried = place / f"tried{source.suffix}"
        seeds.copy(source, tried)
        files = sorted(path for path in tried.rglob("*") if path.is_file()) if tried.is_dir() else [tried]
        victim = rng.choice(files)
        others = [path.read_bytes() for path in whole if path.is_file()]
        victim.write_bytes(mutate.damage(victim.read_bytes(), others, rng))
        (out / "current").write_text(str(tried))
        outcome = readers.attempt(kind, tried)
        count += 1
        (out / "count").write_text(str(count))
        if not readers.is_fine(outcome):
            keep(out, tried, outcome)


def keep(out: Path, tried: Path, outcome: dict) -> None:
    """Copy what was found to `findings`, with what it led to."""
    from tests.fuzz import seeds

    folder = out.parent.parent / "findings"
    folder.mkdir(exist_ok=True)
    name = f"{out.parent.name}-{time.time_ns()}{tried.suffix}"
    seeds.copy(tried, folder / name)
    (folder / f"{name}.json").write_text(json.dumps(outcome | {"path": name}))


def work_guided(target: str, seconds: float, seed: int, out: Path) -> None:
    """One process of atheris, which ends itself."""
    import atheris

    with atheris.instrument_imports(include=["PIL", "jaxnets", "pickletools", "tarfile", "zipfile", "torch"]):
        import pickletools  # noqa: F401
        import tarfile  # noqa: F401
        import zipfile  # noqa: F401

        import PIL.Image  # noqa: F401

        from jaxnets import image_files  # noqa: F401
        from jaxnets.weights import weight_files  # noqa: F401
    from tests.fuzz import readers, seeds

    whole = seeds.write(target, out / "corpus")
    kind, suffix = seeds.KINDS.get(target, target), whole[0].suffix
    tried = out / f"tried{suffix}"

    def test(content: bytes) -> None:
        tried.write_bytes(content)
        outcome = readers.attempt(kind, tried)
        if not readers.is_fine(outcome):
            keep(out, tried, outcome)

    limits = [f"-max_total_time={int(seconds)}", "-timeout=60", "-rss_limit_mb=6000", "-max_len=20000", f"-seed={seed}"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={out}/", str(out / "corpus")], test)
    atheris.Fuzz()


def run_target(target: str, seconds: float, engine: str, seed: int, folder: Path) -> dict:
    """Processes for one target, a new one where one crashes or stalls, until its time is over."""
    end, executions, findings, number = time.monotonic() + seconds, 0, [], 0
    while (left := end - time.monotonic()) > 5:
        out = folder / target / str(number)
        out.mkdir(parents=True)
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.campaign", "--worker", target, "--engine", engine]
        command += ["--seconds", str(left), "--seed", str(seed + number), "--out", str(out)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        with (out / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
            stalled = watch(process, out, engine)
        executions += count_of(out, engine)
        number += 1
        if process.returncode or stalled:
            what = "stalled" if stalled else f"status {process.returncode}"
            findings.append(f"{what} at {(out / 'current').read_text() if (out / 'current').exists() else out}")
    kept = folder / "findings"
    findings += [path.name for path in kept.glob(f"{target}-*.json")]
    print(f"{target}: {executions} executions, {len(findings)} findings", file=sys.stderr, flush=True)
    return {"target": target, "executions": executions, "findings": findings}


def watch(process: subprocess.Popen, out: Path, engine: str) -> bool:
    """Wait for a process; ends it, and says so, where one file takes too long."""
    idle, last = -120, None  # starting may take two minutes
    while process.poll() is None:
        time.sleep(1)
        places = [out / "count"] if engine == "random" else list(out.glob("tried*"))
        now = max((path.stat().st_mtime for path in places if path.exists()), default=None)
        # Seconds that this process has seen: where the whole machine pauses, no file is to blame.
        idle, last = (idle + 1 if now == last else 0), now
        if idle > STALLED:
            process.kill()
            process.wait()
            return True
    return False


def count_of(out: Path, engine: str) -> int:
    if engine == "random":
        return int((out / "count").read_text() or 0) if (out / "count").exists() else 0
    runs = re.findall(r"^#(\d+)|Done (\d+) runs", (out / "log").read_text(errors="replace"), re.MULTILINE)
    return max((int(a or b) for a, b in runs), default=0)


def main() -> None:
    """Run the campaign, or be one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--targets", default="")
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        (work if args.engine == "random" else work_guided)(args.worker, args.seconds, args.seed, args.out)
        return
    from tests.fuzz.seeds import WRITERS

    targets = args.targets.split(",") if args.targets else list(WRITERS if args.engine == "random" else ATHERIS)
    folder = args.out or Path(tempfile.mkdtemp(prefix="jaxnets-fuzz-"))
    seconds = args.minutes * 60 * args.workers / len(targets)
    with ThreadPoolExecutor(args.workers) as pool:
        results = list(pool.map(lambda target: run_target(target, seconds, args.engine, args.seed, folder), targets))
    figures = {result["target"]: result["executions"] for result in results}
    findings = [finding for result in results for finding in result["findings"]]
    total = {
        "engine": args.engine,
        "minutes": args.minutes,
        "workers": args.workers,
        "executions": sum(figures.values()),
    }
    print(json.dumps(total | {"targets": figures, "findings": findings, "folder": str(folder)}))
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
