"""Files from strangers: read or refused in one sentence, in bounded time and memory; none of their code runs."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

import jaxnets
from jaxnets import checkpoint, image_files, settings, torch_weights, workdir
from jaxnets.datasets import open_builder
from jaxnets.errors import UserError
from jaxnets.weights import weight_files
from tests.fuzz.readers import is_fine
from tests.hostile_files import GOOD_CONFIG, KINDS, changed, dataset, marker, replaced


def attempt_all(files: dict, folder, repository) -> dict:
    """The outcome of each file, tried in as few processes as their crashes allow."""
    outcomes = {}
    while left := {path: kind for path, kind in files.items() if path not in outcomes}:
        listing = folder / "listing"
        listing.write_text("".join(f"{kind} {path}\n" for path, kind in left.items()))
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.readers", str(listing)]
        try:
            ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
            output, error = ended.stdout, f"status {ended.returncode}: {ended.stderr[-500:]}"
        except subprocess.TimeoutExpired as expired:
            output, error = (expired.stdout or b"").decode(), "no end"
        said = [json.loads(line) for line in output.splitlines()]
        outcomes |= {outcome["path"]: outcome for outcome in said}
        if len(said) < len(left):
            path = list(left)[len(said)]
            outcomes[path] = {"path": path, "ended": "crash", "said": error, "seconds": 0, "megabytes": 0}
    return outcomes


def needs_missing_torch(name: str) -> bool:
    """Without PyTorch, its files are refused unread."""
    pytorchs = KINDS[name][0] == "weights" and Path(name).suffix in weight_files.TORCH_SUFFIXES
    return pytorchs and not importlib.util.find_spec("torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    for name, (_, _, write) in KINDS.items():
        if not needs_missing_torch(name):
            write(folder / name)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_it_does_no_harm(name, folder, outcomes):
    if needs_missing_torch(name):
        pytest.skip("needs PyTorch, which is not installed")
    outcome = outcomes[str(folder / name)]
    assert is_fine(outcome), outcome
    pattern = KINDS[name][1]
    if pattern:
        assert outcome["ended"] == "refused" and re.search(pattern, outcome["said"]), outcome
    assert not marker(folder / name).exists()


def test_the_pickles_of_these_tests_would_run_code(folder):
    """Or their refusal would prove nothing."""
    import pickle

    pytest.importorskip("torch")
    path = folder / "a bare pickle.bin"
    pickle.loads(path.read_bytes())
    assert marker(path).is_dir()
    marker(path).rmdir()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with one small checkpoint."""
    folder = tmp_path_factory.mktemp("run") / "run"
    folder.mkdir()
    model = jaxnets.create_model(**GOOD_CONFIG["model"])
    images = jnp.zeros((1, 8, 8, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), dict(shapes))
    checkpoint.save_variables(folder, {"batch_stats": {}} | variables)
    (folder / "config.json").write_text(json.dumps(GOOD_CONFIG))
    return folder


def edit_array_metadata(folder, **fields):
    """Let the first array's own description claim something else."""
    base = f"file://{folder}/checkpoints/0/variables/"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    key = next(key for key in store.list().result() if key.endswith(b"kernel/.zarray"))
    store.write(key, json.dumps(json.loads(store.read(key).result().value) | fields)).result()


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


STEP = "checkpoints/0"
RUNS = {
    "whole": (lambda run: None, None),
    "terabytes claimed": (lambda run: edit_array_metadata(run, shape=[10**6, 10**6], chunks=[10**3, 10**3]), "claims"),
    "a negative shape": (lambda run: edit_array_metadata(run, shape=[-4, 4]), "incomplete or damaged"),
    "arrays of objects": (lambda run: edit_array_metadata(run, dtype="|O"), "incomplete or damaged"),
    "arrays of texts": (lambda run: edit_array_metadata(run, dtype="|S4"), "damaged"),
    "another shape": (lambda run: (run / "config.json").write_text(changed(model_width=0.2)), "of another model"),
    "a handler by name": (
        lambda run: edit_json(run / STEP / "_CHECKPOINT_METADATA", item_handlers={"variables": "os.system"}), None
    ),
    "no tree": (lambda run: (run / STEP / "variables/_METADATA").write_text("[" * 100_000), "damaged"),
    "a record that is a list": (lambda run: (run / STEP / "record/metadata").write_text("[]"), "damaged"),
    "digests that are a list": (lambda run: (run / STEP / "record/metadata").write_text('{"digests": []}'), "damaged"),
    "a record nested deep": (lambda run: (run / STEP / "record/metadata").write_text("[" * 200_000), "damaged"),
    "a manifest of noise": (
        lambda run: (run / STEP / "variables/manifest.ocdbt").write_bytes(os.urandom(500)), "damaged"
    ),
    "no manifest": (lambda run: shutil.rmtree(run / STEP / "variables"), "damaged|cannot be read"),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory):
    """A folder with a copy of the workdir for each of `RUNS`."""
    runs = tmp_path_factory.mktemp("runs")
    for name, (edit, _) in RUNS.items():
        edit(shutil.copytree(run, runs / name))
    return runs


@pytest.fixture(scope="module")
def outcomes(folder, runs, tmp_path_factory, repository):
    """Of all files and workdirs, by path: of one process, as it is importing that takes long."""
    files = {str(path): KINDS[path.name][0] for path in folder.iterdir() if path.name in KINDS}
    files |= {str(runs / name): "run" for name in RUNS}
    return attempt_all(files, tmp_path_factory.mktemp("listing"), repository)


@pytest.mark.parametrize("name", RUNS)
def test_a_workdir_does_no_harm(name, runs, outcomes):
    outcome = outcomes[str(runs / name)]
    assert is_fine(outcome), outcome
    # A whole run without an average is refused only because the average is asked for last.
    pattern = RUNS[name][1] or "no averaged weights"
    assert outcome["ended"] == "refused" and re.search(pattern, outcome["said"]), outcome


@pytest.mark.parametrize("name", ["config.json.tmp", "metrics.jsonl.tmp", "data.json", "checkpoints", ".lock"])
def test_a_link_in_a_workdir_does_not_lead_outside(run, tmp_path, name):
    target = tmp_path / "mine"
    target.write_text("precious")
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / name).symlink_to(target)
    config = settings.read(tmp_path / "run" / "config.json")
    with pytest.raises(UserError, match=f"{re.escape(name)}.*a link"), workdir.claim(tmp_path / "run", config):
        pass
    assert target.read_text() == "precious"


def test_a_pipe_in_a_workdir_keeps_nobody_waiting(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    os.mkfifo(tmp_path / "run" / ".lock")
    config = settings.read(tmp_path / "run" / "config.json")
    with pytest.raises(UserError, match="a special file"), workdir.claim(tmp_path / "run", config):
        pass


def test_no_module_of_a_data_set_is_imported(tmp_path, monkeypatch):
    (tmp_path / "harm.py").write_text(f"open({str(tmp_path / 'has-run')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    dataset(tmp_path, replaced("tensorflow_datasets.core.features.image_feature", "harm"))
    with pytest.raises(UserError, match="not a class of TFDS"):
        open_builder("strange", tmp_path)
    assert not (tmp_path / "has-run").exists() and "harm" not in sys.modules


def test_a_program_among_the_images_of_a_data_set_is_not_run(monkeypatch):
    """PIL would start Ghostscript for it."""
    import io

    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a program was started"))
    with pytest.raises(Exception, match="cannot identify"):
        image_files.open_image(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")).load()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_stay_when_their_file_is_gone(tmp_path, suffix):
    """Files are mapped, and what is returned must not be."""
    import safetensors.numpy

    model = jaxnets.create_model("squeezenet1_1_cifar", width=0.1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), dict(shapes))
    state_dict = torch_weights.export(model, {"batch_stats": {}} | variables)
    path = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(value) for name, value in state_dict.items()}, path)
    else:
        safetensors.numpy.save_file(state_dict, path)
    loaded = torch_weights.load(model, path)
    path.write_bytes(bytes(path.stat().st_size))
    assert all((leaf == 0.5).all() for leaf in jax.tree.leaves(loaded["params"]))


def test_a_checkpoint_of_a_training_script_is_still_read(tmp_path):
    """Beside the weights, an optimizer's state and plain values of every kind."""
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": torch.nn.DataParallel(net).state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "best": 0.5,
        "history": [0.1, None, True, "text", 2**40],
        "parameter": net[0].weight,
    }
    for old in (True, False):
        torch.save(content, tmp_path / "net.pth", _use_new_zipfile_serialization=not old)
        assert len(weight_files.read(tmp_path / "net.pth").entries) == 7
