"""Pages as Chromium lays them out."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def width_of(page: Path, screen: int, scratch: Path) -> int:
    """Pixels that a page takes on a screen of that width; more than that, and it must be scrolled sideways."""
    probe = scratch / "probe.html"
    # In a frame, since a window has a least width; its script writes what it measures into the document.
    measure = "this.contentDocument.documentElement.scrollWidth"
    probe.write_text(
        f"<body><iframe src='{page.as_uri()}' style='width:{screen}px;height:900px;border:0' "
        f"onload='document.title = `wide ${{{measure}}}`'></iframe>"
    )
    dumped = _run(["--virtual-time-budget=5000", "--dump-dom", probe.as_uri()], scratch)
    found = re.search(r"<title>wide (\d+)", dumped.stdout.decode())
    assert found, dumped.stderr[-500:]
    return int(found[1])


def sheets_of(page: Path, scratch: Path) -> int:
    """How many sheets it prints on."""
    pdf = scratch / "page.pdf"
    _run([f"--print-to-pdf={pdf}", page.as_uri()], scratch)
    return len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))


def shades_of(page: Path, scratch: Path, dark: bool) -> np.ndarray:
    """The brightness, of 255, of each pixel of its first screen, for one who prefers a dark ground or a light one."""
    picture = scratch / "screen.png"
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _run([scheme, f"--screenshot={picture}", "--window-size=800,900", page.as_uri()], scratch)
    with Image.open(picture) as image:
        return np.asarray(image.convert("L"))


def _run(arguments: list[str], scratch: Path) -> subprocess.CompletedProcess:
    """Skips the test where there is no Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs Chromium to lay the page out (Debian: apt install chromium)")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={scratch / 'profile'}"]
    command += ["--allow-file-access-from-files", *arguments]
    return subprocess.run(command, capture_output=True, timeout=120, check=True)
