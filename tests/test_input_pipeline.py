"""The share of a step that its input takes: the program runs as it stands, and its input is the training's."""

import json
import sys

import jax
import numpy as np

from benchmarks import input_pipeline
from jaxnets import models
from jaxnets.augment import augment
from tests.tiny_net import TinyNet


def test_the_share_is_told(monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "tiny", TinyNet)
    monkeypatch.setattr(input_pipeline, "COUNT", 64)
    monkeypatch.setattr(sys, "argv", ["input_pipeline.py", "--model=tiny", "--batch_size=8", "--rounds=1"])
    input_pipeline.main()
    first, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert first.startswith("tiny, batch 8: step ")
    assert result["share"] == result["input_ms"] / result["step_ms"] > 0


def test_the_input_is_the_last_batch_augmented(monkeypatch):
    monkeypatch.setattr(input_pipeline, "COUNT", 64)
    examples, index = input_pipeline.random_examples(), np.array([[0, 1, 2], [9, 7, 5]], np.int32)
    images, _ = input_pipeline.inputs(examples, index)
    of_step = jax.random.fold_in(input_pipeline.KEY, 1)
    for at, number in enumerate(index[1]):
        key, image = jax.random.fold_in(of_step, at), examples["image"][number]
        np.testing.assert_allclose(images[at], augment(key, image, **input_pipeline.AUGMENTATION), rtol=1e-5, atol=1e-5)
