"""Image files of every kind come out as upright RGB of the right size, or as one sentence."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxnets import image_files
from jaxnets.errors import UserError


def save(path, image, **options):
    image.save(path, **options)
    return str(path)


def pixels(path):
    return np.asarray(image_files.read(path))


@pytest.fixture
def folder(tmp_path):
    """Images, in folders below too, among other files."""
    images = ("b.png", "a.JPG", "below/c.webp", "below/[d].gif")
    for name in (*images, ".hidden.png", ".cache/e.png", "labels.csv", "f.h5"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ("", ["a.JPG", "b.png", "below/[d].gif", "below/c.webp"]),
        ("*.png", ["b.png"]),
        ("*", ["a.JPG", "b.png", "below/[d].gif", "below/c.webp", "f.h5", "labels.csv"]),
        ("**/*.webp", ["below/c.webp"]),
        ("**/[!a-e]*", ["below/[d].gif", "f.h5", "labels.csv"]),
        ("below/**", ["below/[d].gif", "below/c.webp"]),
        ("b.png", ["b.png"]),
        ("labels.csv", ["labels.csv"]),
        ("below/[d].gif", ["below/[d].gif"]),
        ("missing.png", ["missing.png"]),
    ],
)
def test_find(folder, argument, found):
    assert image_files.find(os.path.join(folder, argument), pytest.fail) == [
        os.path.join(folder, name) for name in found
    ]


@pytest.mark.parametrize(("argument", "message"), [("empty", "no image files"), ("*.tiff", "no file matches")])
def test_finding_nothing_is_said(folder, argument, message):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        image_files.find(str(folder / argument), pytest.fail)


def test_a_folder_that_cannot_be_read_keeps_no_others_from_being_found(folder, monkeypatch):
    scandir, refused = os.scandir, []

    def refusing(path):
        if os.fspath(path).endswith("below"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = image_files.find(str(folder), lambda *what: refused.append(what))
    assert found == [str(folder / "a.JPG"), str(folder / "b.png")]
    assert refused == [(str(folder / "below"), "Permission denied")]
    assert image_files.find(str(folder / "below"), lambda *what: refused.append(what)) == []  # said once


def test_a_quoted_pattern_may_begin_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert image_files.find("~/*.png", pytest.fail) == [str(folder / "b.png")]


def checkered(mode, *colours):
    image = Image.new(mode, (2 * len(colours), 3))
    for i, colour in enumerate(colours):
        image.paste(colour, (2 * i, 0, 2 * i + 2, 3))
    return image


def palette(transparent):
    image = Image.new("P", (4, 3))
    image.putpalette([200, 100, 50, 0, 0, 255])
    image.paste(1, (2, 0, 4, 3))
    return image, {"transparency": 1} if transparent else {}


WHITE, BLACK, ORANGE, BLUE = (255, 255, 255), (0, 0, 0), (200, 100, 50), (0, 0, 255)
# Name -> image, options of saving, the colours of its left and right half
KINDS = {
    "rgb.png": (checkered("RGB", ORANGE, BLUE), {}, ORANGE, BLUE),
    "grey.png": (checkered("L", 10, 200), {}, (10,) * 3, (200,) * 3),
    "bits.png": (checkered("1", 0, 1), {}, BLACK, WHITE),
    "palette.png": (*palette(False), ORANGE, BLUE),
    "transparent palette.png": (*palette(True), ORANGE, WHITE),
    "transparent palette.gif": (*palette(True), ORANGE, WHITE),
    "alpha.png": (checkered("RGBA", (*ORANGE, 255), (0, 0, 255, 51)), {}, ORANGE, (204, 204, 255)),
    "clear.webp": (checkered("RGBA", (*ORANGE, 255), (9, 9, 9, 0)), {"lossless": True}, ORANGE, WHITE),
    "grey alpha.png": (checkered("LA", (10, 255), (10, 0)), {}, (10,) * 3, WHITE),
    "transparent grey.png": (checkered("L", 10, 200), {"transparency": 200}, (10,) * 3, WHITE),
    "cmyk.tif": (checkered("CMYK", (0, 0, 0, 0), (255, 0, 0, 0)), {}, WHITE, (0, 255, 255)),
    "cmyk.jpg": (checkered("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), {"quality": 100}, WHITE, BLACK),
    "16 bits.png": (
        Image.fromarray(np.repeat(np.uint16([[0x0AFF, 0xC800]]), 2, 1).repeat(3, 0)), {}, (10,) * 3, (200,) * 3
    ),
    "big endian.tif": (
        Image.fromarray(np.repeat(np.array([[0x0AFF, 0xC800]], ">u2"), 2, 1).repeat(3, 0)), {}, (10,) * 3, (200,) * 3
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_becomes_rgb(tmp_path, name):
    image, options, left, right = KINDS[name]
    found = pixels(save(tmp_path / name, image, **options))
    assert found.shape == (3, 4, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found[:, :2], np.broadcast_to(left, (3, 2, 3)))
    np.testing.assert_array_equal(found[:, 2:], np.broadcast_to(right, (3, 2, 3)))


# EXIF's eight orientations: how to turn the stored picture so that it is upright
UPRIGHT = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_undone(tmp_path, orientation, ending):
    stored = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"turned.{ending}", Image.fromarray(stored), exif=exif)
    np.testing.assert_array_equal(pixels(path), UPRIGHT[orientation](stored))


def test_a_turned_16_bit_image_keeps_its_brightness(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.arange(6, dtype=np.uint16).reshape(2, 3) << 12
    path = save(tmp_path / "turned.png", Image.fromarray(stored), exif=exif)
    np.testing.assert_array_equal(pixels(path)[..., 0], np.rot90(stored >> 8, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"no TIFF header", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\0\x01"])
def test_what_exif_data_cannot_say_leaves_a_whole_picture(tmp_path, exif):
    """With a density in the JFIF header, PIL looks at EXIF's only when it is asked for the orientation."""
    plain, broken = tmp_path / "plain.jpg", tmp_path / "broken.jpg"
    noise().save(plain, dpi=(72, 72))
    noise().save(broken, dpi=(72, 72), exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(pixels(broken), pixels(plain))


@pytest.mark.parametrize(("bits", "photometric", "shown"), [(12, 1, 0x55), (16, 1, 0x05), (16, 0, 0xFA)])
def test_a_tiffs_grey_is_as_deep_and_as_dark_as_it_says(tmp_path, bits, photometric, shown):
    """A strip of one row of two pixels of 0x555, packed by hand, since PIL writes 16 bits from black alone."""
    packed = bytes.fromhex("555555") if bits == 12 else np.full(2, 0x555, "<u2").tobytes()
    tags = [
        (256, 2),
        (257, 1),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, len(packed)),
    ]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 16)
    (tmp_path / "grey.tif").write_bytes(
        head + packed.ljust(8, b"\0") + struct.pack("<H", len(tags)) + entries + bytes(4)
    )
    np.testing.assert_array_equal(pixels(tmp_path / "grey.tif"), np.full((1, 2, 3), shown))


def noise(side=64):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "tif", "bmp", "ppm"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5])
def test_a_truncated_file_is_one_sentence(tmp_path, ending, kept):
    path = tmp_path / f"whole.{ending}"
    noise().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError) as caught:
        image_files.read(str(path))
    assert str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_image_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    save(tmp_path / "numbers.tif", Image.fromarray(np.ones((4, 4), np.float32)))
    save(tmp_path / "bomb.png", Image.new("RGB", (50, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # an error from twice that on
    for name, message in {
        "text.png": "not an image",
        "program.png": "not an image",  # PIL would run Ghostscript
        "numbers.tif": "32-bit numbers",
        "bomb.png": "exceeds limit",
        "missing.png": "no such file",
        "\0.png": "null",
    }.items():
        with pytest.raises(UserError, match=message):
            image_files.read(str(tmp_path / name))


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([7, 28, 33]))
def test_resize_and_crop_is_torchvisions(width, height, size):
    rng = np.random.default_rng(width * height)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    transforms = pytest.importorskip("torchvision.transforms")
    expected = transforms.CenterCrop(size)(transforms.Resize(size * 8 // 7)(image))
    np.testing.assert_array_equal(np.asarray(image_files.resize_and_crop(image, size)), np.asarray(expected))


def test_resize_and_crop_takes_224_of_256():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    transforms = pytest.importorskip("torchvision.transforms")
    expected = transforms.CenterCrop(224)(transforms.Resize(256)(image))
    np.testing.assert_array_equal(np.asarray(image_files.resize_and_crop(image, 224)), np.asarray(expected))


def test_a_thread_of_an_image_is_refused_before_it_fills_the_memory():
    with pytest.raises(UserError, match="1x20000 pixels are too elongated"):
        image_files.resize_and_crop(Image.new("RGB", (1, 20_000)), 224)


def test_squeeze_keeps_the_whole_image_and_what_fits_as_it_is():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 70, 3), np.uint8))
    transforms = pytest.importorskip("torchvision.transforms")
    expected = transforms.Resize((16, 16))(image)
    np.testing.assert_array_equal(np.asarray(image_files.squeeze(image, 16)), np.asarray(expected))
    assert image_files.squeeze(noise(32), 32) == noise(32)


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))


def crop_of(draw):
    """The crop of one trial."""
    return np.asarray(image_files.random_resized_crop(PHOTO, 16, 0.08, np.array([draw])))


def test_a_random_resized_crop_cuts_and_resizes_as_torchvision_does():
    # Area 0.36 of the image at aspect ratio 1, from the middle of the room that leaves.
    side = round(np.sqrt(0.36 * 30 * 50))
    top, left = int(0.5 * (30 - side + 1)), int(0.5 * (50 - side + 1))
    transforms = pytest.importorskip("torchvision.transforms")
    theirs = transforms.functional.resized_crop(PHOTO, top, left, side, side, [16, 16])
    np.testing.assert_array_equal(crop_of([(0.36 - 0.08) / 0.92, 0.5, 0.5, 0.5]), np.asarray(theirs))


@pytest.mark.parametrize("shape", [(50, 50), (20, 200), (200, 20), (1, 300), (3, 2), (1, 1)])
def test_random_resized_crops_lie_within_any_image(shape):
    """Marked images: outside of an image PIL's crop is black, so every mean stays that of a white one."""
    rng = np.random.default_rng(1)
    image = Image.new("RGB", shape, "white")
    extremes = [
        np.tile([a, b, c, c], (10, 1)) for a in (0, 1 - 2**-53) for b in (0, 1 - 2**-53) for c in (0, 1 - 2**-53)
    ]
    for draws in (*rng.random((50, 10, 4)), *extremes):
        assert np.asarray(image_files.random_resized_crop(image, 8, 0.08, draws)).min() == 255


def test_random_resized_crops_take_the_areas_and_ratios_that_they_should(monkeypatch):
    """Of a large image, whose crops are spied upon: area uniform from the least, ratios within 3/4 and 4/3."""
    boxes = []
    image = Image.new("RGB", (1000, 800))
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: boxes.append(box) or PHOTO)
    for draws in np.random.default_rng(2).random((2000, 10, 4)):
        image_files.random_resized_crop(image, 8, 0.25, draws)
    left, top, right, bottom = np.array(boxes).T
    areas, ratios = (right - left) * (bottom - top) / 800_000, (right - left) / (bottom - top)
    assert areas.min() > 0.245 and areas.max() <= 1
    assert ratios.min() > 0.74 and ratios.max() < 1.34
    fitting = areas < 0.6  # larger ones fit only at some ratios
    assert abs(np.log(ratios[fitting]).mean()) < 0.02
    assert np.quantile(areas[fitting], 0.5) == pytest.approx(0.425, abs=0.015)
    # Everywhere that a crop can be
    room = (left / np.maximum(1000 - (right - left), 1))[fitting]
    assert room.min() < 0.02 and room.max() > 0.98 and room.mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("shape", "middle"), [((200, 20), (86.5, 113.5)), ((20, 200), (86.5, 113.5))])
def test_where_no_crop_fits_it_is_the_middle(shape, middle):
    """As in torchvision: the full shorter side, 4/3 of it along the other."""
    wide = shape[0] > shape[1]
    pixels = np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 20, 3))
    image = Image.fromarray(pixels.swapaxes(0, 1) if wide else pixels)
    found = np.asarray(image_files.random_resized_crop(image, 100, 0.9, np.full((10, 4), 0.99)))
    assert (found.min(), found.max()) == pytest.approx(middle, abs=1.6)
