"""The share of a step that its input takes: the program runs as it stands, and its input is the training's."""

import itertools
import json

import jax
import numpy as np
import pytest

from benchmarks import input_pipeline
from jaxnets import models
from jaxnets.augment import augment
from jaxnets.errors import UserError
from tests.tiny_net import TinyNet


def test_the_share_is_told(monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)
    monkeypatch.setattr(input_pipeline, "COUNT", 64)
    times = {"train": iter([9e3, 8.0]), "input": itertools.chain([7e3] * 8, itertools.repeat(0.5))}

    def milliseconds(call, *args):
        result = jax.block_until_ready(call(*args))
        return next(times["input" if call is input_pipeline.inputs else "train"]), result

    monkeypatch.setattr(input_pipeline, "milliseconds", milliseconds)
    input_pipeline.main(["input_pipeline.py", "--model=tiny", "--batch_size=8", "--rounds=1"])
    first, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert first.startswith("tiny, batch 8: step ")
    # Of calls of four steps; those that compile do not count.
    assert result == {"step_ms": 2.0, "input_ms": 0.125, "share": 0.0625}


@pytest.mark.parametrize(
    ("argument", "says"),
    [("--model=nonsense", "no net 'nonsense'"), ("--rounds=0", "--rounds=0"), ("--batch_size=1", "--batch_size=1")],
)
def test_bad_arguments_are_one_sentence(argument, says):
    with pytest.raises(UserError, match=says):
        input_pipeline.main(["input_pipeline.py", argument])


def test_the_input_is_the_last_batch_augmented(monkeypatch):
    monkeypatch.setattr(input_pipeline, "COUNT", 64)
    examples, index = input_pipeline.random_examples(), np.array([[0, 1, 2], [9, 7, 5]], np.int32)
    images, _ = input_pipeline.inputs(examples, index)
    of_step = jax.random.fold_in(input_pipeline.KEY, 1)
    for at, number in enumerate(index[1]):
        key, image = jax.random.fold_in(of_step, at), examples["image"][number]
        np.testing.assert_allclose(images[at], augment(key, image, **input_pipeline.AUGMENTATION), rtol=1e-5, atol=1e-5)
