"""The picture of the benchmark's results."""

import json

import pytest

from benchmarks import plot
from jaxnets.errors import UserError


def record_of(*races):
    of_all = {"batch_size": 64, "image_size": 96, "contenders": {"jaxnets": {"dtype": "float32"}}}
    races = [{"model": model, "mode": mode, "ratios": ratios} | of_all for model, mode, ratios in races]
    return {"races": races, "environment": {}}


def ratio(low, median, high):
    return {"low": low, "median": median, "high": high}


def test_the_picture_shows_the_ratios_to_the_faster_pytorch():
    record = record_of(
        ("mobilenet_v2", "train", {"torch": ratio(1.4, 1.5, 1.6), "torch_compile": ratio(1.1, 1.2, 1.3)}),
        ("mobilenet_v2", "eval", {"torch": ratio(0.7, 0.8, 0.9), "flax": ratio(0.1, 0.2, 0.3)}),
        ("squeezenet1_1", "train", {"flax": ratio(9.0, 9.0, 9.0)}),
    )
    bars = plot.bars_of([record])
    assert bars == [
        plot.Bar("mobilenet_v2", "train", 1.2, 1.1, 1.3),
        plot.Bar("mobilenet_v2", "eval", 0.8, 0.7, 0.9),
    ]
    # The race of SqueezeNet has no bar.
    other = {"batch_size": 1, "image_size": 224}
    latency = record_of(("mobilenet_v2", "latency", {"torch": ratio(1, 1, 1)}))
    latency["races"] = [race | other for race in latency["races"]]
    said = "float32, batch sizes: training 64 at 96 px; evaluation 64 at 96 px; latency of one image 1 at 224 px."
    assert plot.raced([record, latency]) == said
    axes = plot.draw(bars, "a note").axes[0]
    assert sorted(patch.get_width() for patch in axes.patches) == [0.8, 1.2]
    with pytest.raises(UserError, match="mobilenet_v2 train twice"):
        plot.bars_of([record, record])


def test_the_picture_is_written(tmp_path):
    source, picture = tmp_path / "result.json", tmp_path / "picture.svg"
    about = {"device": "abacus", "cores": 1, "versions": {"jax": "0"}, "date": "2026-01-01T00:00"}
    source.write_text(json.dumps(record_of(("mobilenet_v2", "train", {"torch": ratio(1, 1, 1)})) | about))
    plot.main(["plot", str(source), f"--out={picture}"])
    assert picture.read_text().startswith("<?xml")
    source.write_text("[]")
    with pytest.raises(UserError, match="is not a result of"):
        plot.main(["plot", str(source), f"--out={picture}"])
    with pytest.raises(UserError, match="must end in"):
        plot.main(["plot", str(source), f"--out={tmp_path / 'picture.doc'}"])
    source.write_text(json.dumps({"races": [{"model": "mobilenet_v2", "mode": "train"}]} | about | {"environment": {}}))
    with pytest.raises(UserError, match="is not a result of"):
        plot.main(["plot", str(source), f"--out={picture}"])
    source.write_text(json.dumps(record_of(("mobilenet_v2", "sleep", {"torch": ratio(1, 1, 1)})) | about))
    with pytest.raises(UserError, match="is not a result of"):
        plot.main(["plot", str(source), f"--out={picture}"])
    source.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not a result of"):
        plot.main(["plot", str(source), f"--out={picture}"])
    source.write_text(json.dumps(record_of(("mobilenet_v2", "train", {"torch": ratio(1, 1, 1)})) | about))
    with pytest.raises(UserError, match="picture.png cannot be written: No such file or directory"):
        plot.main(["plot", str(source), f"--out={tmp_path / 'nowhere' / 'picture.png'}"])
