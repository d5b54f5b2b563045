"""Every file of the newest checkpoint, damaged in every way; whole runs at random by `tests.chaos.damage`."""

import random
import shutil
from contextlib import closing

import jax
import numpy as np
import pytest

from jaxnets import checkpoint
from jaxnets.errors import UserError
from jaxnets.plan import make_plan
from jaxnets.restore import restore_latest
from tests.chaos import damage, runs
from tests.slow import slow_after

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def made(tiny, data_dir, tmp_path_factory):
    """The reference, and the run that was killed in its last epoch."""
    return damage.make_runs(tmp_path_factory.mktemp("runs"), data_dir)


@pytest.fixture(scope="module")
def template(tiny, data_dir):
    return make_plan(runs.make_config(data_dir, num_epochs=4)).state_shapes


def restore(workdir, template):
    """The step that a start would go on from, and its state as a flat list; None where it would start over."""
    with closing(checkpoint.open_manager(workdir, keep=3)) as manager:
        restored = restore_latest(manager, template)
    return restored and (int(restored[0].step), jax.tree.leaves(restored[0]))


@pytest.mark.parametrize("way", slow_after(1, damage.WAYS))
def test_any_file_damaged_leaves_the_newest_checkpoint_or_the_one_before(made, template, tmp_path, way):
    killed, rng = made[1], random.Random(way)
    states = {}
    for step in (damage.NEWEST, damage.BEFORE):
        shutil.copytree(killed, tmp_path / "whole")
        if step == damage.BEFORE:
            shutil.rmtree(tmp_path / "whole" / "checkpoints" / str(damage.NEWEST))
        at, states[step] = restore(tmp_path / "whole", template)
        assert at == step
        shutil.rmtree(tmp_path / "whole")
    steps = []
    for file in damage.files(killed):
        shutil.copytree(killed, tmp_path / "run")
        damage.WAYS[way](tmp_path / "run" / file, rng)
        at, state = restore(tmp_path / "run", template)
        assert all(map(np.array_equal, state, states[at])), file
        assert (tmp_path / "run" / "damaged" / f"{damage.NEWEST}.1").is_dir() == (at == damage.BEFORE), file
        shutil.rmtree(tmp_path / "run")
        steps.append(at)
    assert set(steps) == {damage.NEWEST, damage.BEFORE}  # some files are kept twice, or for nothing


def test_a_damaged_checkpoint_without_another_never_means_starting_over(made, template, tmp_path):
    """One file of each item, and each file beside them."""
    rng, refused = random.Random(0), 0
    for file in {file.parts[2]: file for file in damage.files(made[1])}.values():
        shutil.copytree(made[1], tmp_path / "run")
        for step in (5, damage.BEFORE):
            shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
        damage.remove(tmp_path / "run" / file, rng)
        try:
            assert restore(tmp_path / "run", template)[0] == damage.NEWEST, file
        except UserError as error:
            assert "no checkpoint" in str(error) and "is intact" in str(error)
            refused += 1
        shutil.rmtree(tmp_path / "run")
    assert refused


@pytest.mark.parametrize("file", ["metrics/metrics", "record/metadata", "rest/manifest.ocdbt"])
@pytest.mark.parametrize("way", slow_after(1, ["truncate", "flip"]))
def test_a_run_goes_on_to_the_same_end(made, data_dir, tmp_path, file, way):
    shutil.copytree(made[1], tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / str(damage.NEWEST) / file
    damage.WAYS[way](damaged, random.Random(file))
    outcome = damage.outcome_of(tmp_path / "run", made[0], data_dir)
    assert outcome == ("kept" if "metrics" in file else "went back")


def test_an_evaluation_that_reads_well_but_was_not_written_does_not_count(made, data_dir, tmp_path):
    shutil.copytree(made[1], tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "5" / "metrics" / "metrics"
    file.write_text(file.read_text().replace('"eval_accuracy": 0', '"eval_accuracy": 9'))
    outcome = runs.attempt(runs.make_config(data_dir, num_epochs=4), tmp_path / "run")
    assert any("the evaluation of checkpoint 5" in line and "is damaged" in line for line in outcome.log)
    with closing(checkpoint.open_reader(tmp_path / "run")) as manager:
        assert checkpoint.find_step(manager, "best") != 5
    assert runs.differences(tmp_path / "run", made[0]) == []
