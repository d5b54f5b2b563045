"""Image files as upright RGB images of the size a net takes, whatever is in them."""

import collections
import functools
import glob
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from jaxnets.errors import UserError, first_line, printable
from jaxnets.plain_files import open_at_once

logger = logging.getLogger(__name__)
_one_large_image = threading.Lock()

# Without those that run another program (EPS) or are not pictures (HDF5, PDF).
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM", "JPEG2000")
# An untrusted image may cost half a gigabyte and five seconds at most.
MAX_BYTES = 1 << 28  # of a file: some formats are read whole before anything is known about them
MAX_PIXELS = 1 << 26  # 256 MB in PIL, once or twice
COSTLY_FORMATS = ("WEBP", "AVIF", "JPEG2000")  # several times the memory and time, like transparency: MAX_PIXELS // 4
MAX_SCANNED_PIXELS = 1 << 31  # pixels times scans: each scan of a progressive JPEG goes over all of its pixels
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of a TIFF
TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LARGE = 1 << 24  # pixels from which on images are decoded one at a time, whatever the number of threads


def find(argument: str, refuse: Callable[[str, str], None]) -> list[str]:
    """The files that a path, a folder or a glob pattern stands for, sorted; UserError if there are none to be seen.

    For a folder, these are the files below it with an image's suffix; hidden ones are left out. A path that exists
    is never taken for a pattern, and one that does not exist is returned for `read` to complain about. `refuse` is
    called with a folder below that cannot be read, and why.
    """
    others: collections.Counter[str] = collections.Counter()
    refused = []

    def note(folder: str, why: str) -> None:
        refused.append(folder)
        refuse(folder, why)

    if not os.path.lexists(argument):
        argument = os.path.expanduser(argument)  # in a quoted pattern, the shell leaves it to us
    if os.path.isdir(argument):
        files = sorted(images_below(argument, others, note))
        say_left_out(argument, others)
        if not files and not refused:
            raise UserError("the folder holds no image files")
        return files
    if os.path.lexists(argument) or not glob.has_magic(argument):
        return [argument]
    files = []
    for match in sorted(glob.glob(argument, recursive=True)):
        files += sorted(images_below(match, others, note)) if os.path.isdir(match) else [match]
    say_left_out(argument, others)
    if not files and not refused:
        raise UserError("no file matches this pattern")
    return list(dict.fromkeys(files))  # `**` matches a folder, and what is in it too


def images_below(folder: str, others: collections.Counter[str], refuse: Callable[[str, str], None]) -> Iterator[str]:
    """The files with an image's suffix at any depth in a folder; hidden ones are left out.

    Those with other suffixes are counted in `others`, by suffix. Links to folders are not followed: they may form
    cycles. `refuse` is called with a folder that cannot be read, and why.
    """
    endings = _endings()
    for parent, folders, files in os.walk(folder, onerror=lambda error: refuse(error.filename, error.strerror)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (name for name in files if not name.startswith(".")):
            if (ending := Path(name).suffix.lower()) in endings:
                yield os.path.join(parent, name)
            else:
                others[ending or "none"] += 1


def count_images_in(folder: Path) -> int:
    """How many files with an image's suffix are directly in a folder."""
    endings = _endings()
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    images = (name for name in names if os.path.splitext(name)[1].lower() in endings)
    return sum(os.path.isfile(folder / name) for name in images)


@functools.cache
def _endings() -> set[str]:
    Image.init()
    return {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}


def say_left_out(folder: str, others: collections.Counter[str]) -> None:
    """Log the files that `images_below` left out, perhaps of a format that is not read."""
    if others:
        endings = ", ".join(f"{ending} {count}" for ending, count in others.most_common(5))
        logger.info(
            "%d files in %s are left out because their names do not end like an image's: %s",
            others.total(),
            printable(folder),
            printable(endings),
        )


def read(path: str, fit: Callable[[Image.Image], Image.Image] = lambda image: image) -> Image.Image:
    """The file's first image in RGB, turned as its EXIF data say; UserError, without the path, if it has none.

    Transparent pixels become white. Grey of 12 or 16 bits keeps its upper 8. Colour profiles are not applied, as in
    the pipelines with which the published weights were trained. `fit` is applied here, so that only one large
    image is in memory at a time, whatever the number of threads.
    """
    try:
        with (
            open(path, "rb", opener=open_at_once) as file,
            open_image(file) as image,
            one_if_large(image),
        ):
            return fit(_to_rgb(image))
    except UnidentifiedImageError:
        raise UserError("not an image that can be read, or its beginning is damaged") from None
    except FileNotFoundError:
        raise UserError("there is no such file") from None
    except UserError:
        raise
    except Exception as error:  # for a damaged file PIL raises anything from OSError to struct.error
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(reason) from error


def one_if_large(image: Image.Image) -> AbstractContextManager:
    """Within the block, a LARGE image is the only such one that this process decodes and shrinks."""
    return _one_large_image if image.width * image.height > LARGE else nullcontext()


def open_image(file: BinaryIO) -> Image.Image:
    """The image in a file, not decoded yet: `load` then does that within bounds of memory and time.

    Raises UserError if it is too large, and PIL's own errors if PIL cannot read it.
    """
    size = file.seek(0, os.SEEK_END)
    if size > MAX_BYTES:
        raise UserError(f"{size >> 20} MiB is too much for an image: at most {MAX_BYTES >> 20} are read")
    file.seek(0)
    image = Image.open(file, formats=_formats())
    width, height = image.size
    limit = MAX_PIXELS // 4 if image.format in COSTLY_FORMATS or image.has_transparency_data else MAX_PIXELS
    if width * height > limit:
        raise UserError(f"{width}x{height} pixels are too many: at most {limit} are decoded from such a file")
    if image.format in ("JPEG", "MPO"):
        _refuse_endless_scans(image, file)
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this PIL can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _refuse_endless_scans(image: Image.Image, file: BinaryIO) -> None:
    place = file.tell()
    file.seek(0)
    scans, last = 0, b""
    while chunk := file.read(1 << 20):
        scans += (last + chunk).count(b"\xff\xda")  # in coded pixels, 255 is always followed by 0 or a restart marker
        last = chunk[-1:]
    file.seek(place)
    if image.width * image.height * scans > MAX_SCANNED_PIXELS:
        raise UserError(f"{scans} scans of {image.width}x{image.height} pixels are too many")


def _to_rgb(image: Image.Image) -> Image.Image:
    grey = eight_bits(image)
    turn = _turn_upright(image)
    if grey is not image:
        image = grey
    elif image.has_transparency_data:  # PIL's conversion to RGB would show the colours that it hides
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 12 or 16 bits reduced to its upper 8; other images unchanged. UserError for pixels of unknown range.

    PIL's conversion to RGB would clip values at 255.
    """
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
        # A TIFF's grey may have 12 bits, and 0 may mean white; PIL gives its numbers as they are.
        tags = image.tag_v2 if image.format == "TIFF" else {}
        bits, inverted = np.ravel(tags.get(BITS_PER_SAMPLE, 16))[0], tags.get(PHOTOMETRIC) == 0
        grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        return Image.fromarray(255 - grey if inverted else grey)
    if image.mode in ("I", "F"):
        raise UserError("its pixels are 32-bit numbers, whose range is unknown")
    return image


def _turn_upright(image: Image.Image) -> Image.Transpose | None:
    """Decode the image; returns how it must be turned by its EXIF data, None if they do not say or cannot be read."""
    image.load()  # which turns a TIFF by itself
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # the picture itself is whole; PIL raises anything from SyntaxError to KeyError
        return None


def squeeze(image: Image.Image, size: int) -> Image.Image:
    """The whole image resized to `size` x `size` pixels, bilinear and antialiased, as the data sets' images are."""
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The central `size` x `size` pixels of the image resized to a shorter side of 8/7 `size` (256 for 224).

    The same as torchvision's Resize and CenterCrop, pixel for pixel. Raises UserError for an image so elongated
    that, once resized, it would be larger than PIL allows.
    """
    width, height = image.size
    shorter = size * 8 // 7
    resized = tuple(int(shorter * side / min(width, height)) for side in image.size)
    if Image.MAX_IMAGE_PIXELS and resized[0] * resized[1] > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"{width}x{height} pixels are too elongated to be resized")
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in resized)
    return image.crop((left, top, left + size, top + size))


def random_resized_crop(image: Image.Image, size: int, least_area: float, draws: np.ndarray) -> Image.Image:
    """A random part of the image, `least_area` to all of it, resized to `size` x `size` pixels (1409.4842, section 6).

    `draws` are uniform in [0, 1), float64 `(T, 4)`: for each of T trials area, aspect ratio (3/4 to 4/3, uniform in
    its logarithm), top and left. If no trial fits into the image, the part is its centre, as large as such a ratio
    allows, as in torchvision's RandomResizedCrop.
    """
    width, height = image.size
    for area, ratio, top, left in draws.tolist():
        pixels = width * height * (least_area + (1 - least_area) * area)
        aspect = (4 / 3) ** (2 * ratio - 1)
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            break
    else:
        w = max(min(width, round(height * 4 / 3)), 1)
        h = max(min(height, round(width * 4 / 3)), 1)
        x, y = (width - w) // 2, (height - h) // 2
    return image.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BILINEAR)
