"""How long the atlas of 375,000 pairs takes to be placed and sent, and how long its frames take in a real browser.

    python benchmarks/atlas.py RUN [--pairs 375000] [--seconds 6]

A copy of the run's catalog repeats its pairs until there are enough, under keys of their own, each copy's vectors moved
a little. It is served with the run's bundle and index. Chromium opens the atlas through Playwright, and a mouse drags
the map and turns its wheel in and out while the page notes when each frame begins (requestAnimationFrame) and how long
it draws (`AtlasMap.paint`). The last line is JSON. Bar: frames of at most 33 ms at the 95th percentile.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
from playwright.sync_api import Page, sync_playwright
from semdedup import machine

from modeclip.clustering.embedding import COLUMN
from modeclip.clustering.fitting import ClusterResult
from modeclip.data.catalog import Catalog
from modeclip.serving.atlas import place
from modeclip.system.paths import RunPaths
from serving import start

SIZE = {"width": 1280, "height": 800}
CHROMIUM = next(found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name)))
RECORD = """async () => {
  const { AtlasMap } = await import("/site/map.js"), paint = AtlasMap.prototype.paint;
  window.seen = { frames: [], paints: [] };
  AtlasMap.prototype.paint = function () { paint.call(this); window.seen.paints.push(1000 * this.paintSeconds); };
  const step = now => { window.seen.frames.push(now); requestAnimationFrame(step); };
  requestAnimationFrame(step);
}"""


def grow(run: Path, out: Path, pairs: int) -> None:
    """Write the folder of a run whose catalog has more pairs."""
    small = lance.dataset(str(RunPaths(folder=run).catalog_path))
    random, times = np.random.default_rng(0), math.ceil(pairs / small.count_rows())

    def batches() -> Iterator[pa.RecordBatch]:
        left = pairs
        for copy in range(times):
            for batch in small.to_batches(batch_size=4096):
                if not left:
                    return
                batch = batch.slice(0, min(left, len(batch)))
                left -= len(batch)
                columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                columns["key"] = pa.array(
                    [f"{key}#{copy}" for key in batch["key"].to_pylist()], small.schema.field("key").type
                )
                flat = np.array(batch[COLUMN].flatten(), copy=True)
                flat += (0.02 * random.standard_normal(len(flat))).astype(flat.dtype)
                kind = small.schema.field(COLUMN).type
                columns[COLUMN] = pa.FixedSizeListArray.from_arrays(pa.array(flat), kind.list_size).cast(kind)
                yield pa.record_batch(list(columns.values()), schema=small.schema)

    paths = RunPaths(folder=out)
    lance.write_dataset(pa.RecordBatchReader.from_batches(small.schema, batches()), str(paths.catalog_path))
    for name in ("clusters", "bundle"):
        shutil.copytree(run / name, out / name)


def watch(page: Page, address: str, seconds: float) -> dict[str, dict[str, float]]:
    """Move and zoom the map, and return the milliseconds of frames and of drawing for each."""
    page.goto(f"{address}/#/atlas")
    page.keyboard.press("Escape")
    page.wait_for_selector("canvas", state="visible", timeout=600_000)
    page.wait_for_timeout(3000)
    page.keyboard.press("Escape")
    page.evaluate(RECORD)
    box = page.locator("canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    found = {}
    for name in ("moving, all in view", "zooming", "moving, zoomed in"):
        page.mouse.move(x, y)
        if name == "moving, zoomed in":
            page.mouse.wheel(0, -900)
            page.wait_for_timeout(1000)
        page.evaluate("() => { window.seen.frames.length = window.seen.paints.length = 0; }")
        end, number = time.perf_counter() + seconds, 0
        if name != "zooming":
            page.mouse.down()
        while time.perf_counter() < end:
            number += 1
            if name == "zooming":
                page.mouse.wheel(0, -60 if number % 40 < 20 else 60)
            else:
                page.mouse.move(x + 90 * math.sin(number / 9), y + 60 * math.cos(number / 7))
        page.mouse.up()
        seen = page.evaluate("() => window.seen")
        frames, paints = np.diff(seen["frames"]), np.array(seen["paints"])
        found[name] = {
            "frames": len(frames),
            "frame_p50": float(np.quantile(frames, 0.5)),
            "frame_p95": float(np.quantile(frames, 0.95)),
            "paint_p50": float(np.quantile(paints, 0.5)),
            "paint_p95": float(np.quantile(paints, 0.95)),
        }
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=375_000)
    parser.add_argument("--seconds", type=float, default=6.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="modeclip-atlas-") as folder:
        run = Path(folder) / "run"
        grow(arguments.run, run, arguments.pairs)
        paths = RunPaths(folder=run)
        begun, used = time.perf_counter(), time.process_time()
        place(Catalog.open(paths.catalog_path, verify=False), ClusterResult.load(paths.clusters))
        placing, placing_used = time.perf_counter() - begun, time.process_time() - used
        process, port = start(["-m", "modeclip", "serve", str(run), "--index", str(arguments.run / "index")])
        try:
            address, sent = f"http://127.0.0.1:{port}", {}
            for name in ("summary", "points", "colour/expert"):
                with urllib.request.urlopen(f"{address}/atlas/{name}", timeout=600) as answer:
                    sent[name] = len(answer.read())
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
                found = watch(browser.new_page(viewport=SIZE), address, arguments.seconds)  # type: ignore[arg-type]
                browser.close()
        finally:
            os.kill(process.pid, signal.SIGTERM)
            process.wait()
    today = str(datetime.now(UTC).date())
    print(f"{today}, {machine()}, load {os.getloadavg()[0]:.1f}, {arguments.pairs:,} pairs")
    print("Chromium without a GPU, 1280 x 800")
    print(f"placed in {placing:.1f} s ({placing_used:.1f} s of processor time)")
    print("sent: " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sent.items()))
    print(f"{'':<22}{'frames':>8}{'p50, ms':>10}{'p95, ms':>10}{'drawing p50':>13}{'p95':>8}")
    for name, own in found.items():
        print(
            f"{name:<22}{own['frames']:>8}{own['frame_p50']:>10.1f}{own['frame_p95']:>10.1f}{own['paint_p50']:>13.1f}"
            f"{own['paint_p95']:>8.1f}"
        )
    facts = {"date": today, "machine": machine(), "load": os.getloadavg()[0], "pairs": arguments.pairs}
    print(json.dumps({**facts, "placing_seconds": placing, "placing_processor": placing_used, "bytes": sent, **found}))


if __name__ == "__main__":
    main()
