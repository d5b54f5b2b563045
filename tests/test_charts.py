"""What is drawn is what is there: no value of a matrix is lost, no point is cut off."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from jaxnets import charts


@pytest.mark.parametrize("classes", [30, 401, 1000])
def test_every_value_of_a_matrix_is_drawn(classes):
    """One confusion of each class: all rows of the picture have ink, however many are one row of its dots."""
    shares = np.zeros((classes, classes))
    shares[np.arange(classes), np.random.default_rng(0).permutation(classes)] = 1.0
    svg = charts.draw_matrix("matrix", shares, xlabel="taken for", ylabel="is")
    picture = re.search(r'href="data:image/png;base64,([^"]*)"', svg, re.DOTALL)[1]
    ink = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGBA"))[..., 3]
    assert (ink > 200).any(0).all() and (ink > 200).any(1).all()


def test_a_dot_of_a_large_matrix_is_its_largest_value():
    values = np.arange(25.0).reshape(5, 5)
    np.testing.assert_array_equal(charts._largest(values, 2), [[6, 8, 9], [16, 18, 19], [21, 23, 24]])
    np.testing.assert_array_equal(charts._largest(values, 1), values)


def test_points_on_an_axis_from_zero_are_whole():
    """Of values that hardly differ, the highest do not lie on the edge."""
    curve = charts.Curve(np.arange(12), np.linspace(485, 508, 12), "series-1", marked=True)
    svg = charts.draw_curves("speed", [curve], xlabel="step", from_zero=True)
    heights = [float(y) for y in re.findall(r'<use [^>]* y="([\d.]+)"', svg)]
    edge = min(float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", svg))
    assert min(heights) > edge


def test_a_loss_over_many_decades_has_few_numbers():
    curve = charts.Curve(np.arange(50), np.logspace(0, -5, 50), "series-1")
    svg = charts.draw_curves("loss", [curve], xlabel="step")
    assert 4 <= len(re.findall(r"<text[^>]*>(?:1e-05|0\.0*1|1)</text>", svg)) == len(re.findall("ytick_[0-9]+", svg))
