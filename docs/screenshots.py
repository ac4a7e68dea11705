"""Pictures of pages for the documentation, taken with Chromium.

    modeclip demo --out runs/demo
    modeclip curate runs/demo metaclip --entries wordnet --t 5
    python docs/screenshots.py runs/demo/curation/metaclip/curate.html docs/assets/curate.png --height 1290

A page is loaded from disk, as it is sent to somebody.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def take(page: Path, width: int, height: int, *, dark: bool = False) -> Image.Image:
    """Return the upper part of a page as a browser shows it."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"]
        options += [f"--user-data-dir={folder}/profile", f"--window-size={width},{height}", f"--screenshot={picture}"]
        options += ["--blink-settings=preferredColorScheme=0"] if dark else []
        subprocess.run([browser, *options, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
        return Image.open(io.BytesIO(picture.read_bytes())).convert("RGB")


def main() -> None:
    """Take a picture of a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=1200)
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    picture = take(arguments.page, arguments.width, arguments.height, dark=arguments.dark)
    picture.save(arguments.picture, "PNG", optimize=True)


if __name__ == "__main__":
    main()
