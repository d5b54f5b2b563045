"""Damaged at random, every file is read or refused in one sentence; `tests.fuzz.campaign` does this for hours."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import mutate, readers, seeds

TARGETS = ("torch", "safetensors", "image", "archive", "config", "records", "predictions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module", params=TARGETS)
def whole(request, folder):
    """The kind of reader, and files that it takes as they are."""
    if request.param == "torch":
        pytest.importorskip("torch")
    kind = seeds.KINDS.get(request.param, request.param)
    paths = seeds.write(request.param, folder / request.param)
    for path in paths:
        assert readers.attempt(kind, path)["ended"] == "read", path
    return kind, paths


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_damage_is_refused_in_one_sentence(whole, folder, seed):
    kind, paths = whole
    rng = random.Random(seed)
    source = rng.choice(paths)
    tried = folder / f"tried{source.suffix}"
    seeds.copy(source, tried)
    victim = rng.choice([path for path in tried.rglob("*") if path.is_file()] if tried.is_dir() else [tried])
    victim.write_bytes(mutate.damage(victim.read_bytes(), [path.read_bytes() for path in paths if path.is_file()], rng))
    outcome = readers.attempt(kind, tried)
    assert readers.is_fine(outcome), outcome
