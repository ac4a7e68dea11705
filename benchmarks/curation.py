"""Seconds and memory of curating a pool of web-like captions by ALIGN and K-LITE; what docs/scale.md says of them.

    python benchmarks/curation.py                                 400,000 pairs for align, 50,000 for klite
    python benchmarks/curation.py --only align --pairs 4000000
    python benchmarks/curation.py --only near                     cosines with evaluation images alone
    python benchmarks/curation.py --only wiktionary               reading a dump of Wiktionary

Captions are the first 4 to 16 words of WordNet's glosses; a tenth of the pairs has one of 1,000 captions, a tenth an
image that another pair has too. Each method curates a quarter of the pool and all of it, each in a process of its own,
which tells its peak memory. Rates are by processor time too, since the clock of a busy machine tells little.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from modeclip.data.catalog import FINGERPRINT, FORMAT, FORMAT_VERSION, PAIR_COLUMNS
from modeclip.data.storage import FileWriter, create
from modeclip.data.wordnet import load_wordnet

PAIRS = {"align": 400_000, "klite": 50_000}
CURATE = """
import json, time
from modeclip.curation.curating import curate
from modeclip.data.catalog import Catalog
from modeclip.system.devices import PeakMemory
catalog = Catalog.open({catalog!r})
with PeakMemory() as peak:
    started, used = time.monotonic(), time.process_time()
    curated = curate(catalog, {method!r}, **{settings!r})
    took = [time.monotonic() - started, time.process_time() - used]
kept = curated.column("kept")
print(json.dumps([len(catalog), *took, peak.gb, float(kept.mean())]))
"""
NEAR = """
import json, time
import numpy as np
from modeclip.clustering.distances import assign_nearest
from modeclip.system.devices import PeakMemory
random = np.random.default_rng(0)
def unit(rows):
    vectors = random.standard_normal((rows, 512), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
images, wanted = unit(20_000), unit(10_000)
with PeakMemory() as peak:
    started, used = time.monotonic(), time.process_time()
    assign_nearest(images, wanted)
    print(json.dumps([len(images), time.monotonic() - started, time.process_time() - used, peak.gb, 1.0]))
"""
WIKTIONARY = """
import json, time
from modeclip.data.knowledge import read_wiktionary
from modeclip.system.devices import PeakMemory
with PeakMemory() as peak:
    started, used = time.monotonic(), time.process_time()
    found = read_wiktionary({dump!r})
    print(json.dumps([{count}, time.monotonic() - started, time.process_time() - used, peak.gb, 1.0]))
"""


def write_pool(path: Path, count: int) -> None:
    """Write a catalog without pictures."""
    draw, glosses = random.Random(0), [synset.definition.split() for synset in load_wordnet().synsets]
    often = [" ".join(draw.choice(glosses)[:8]) for _ in range(1000)]
    columns = ("key", "caption", "path", "offset", "size", "width", "height", "digest", "group")
    schema = pa.schema([(name, PAIR_COLUMNS[name]) for name in (*columns, "image")])
    writer = FileWriter(str(path), schema)
    for start in range(0, count, 1 << 16):
        rows = range(start, min(start + (1 << 16), count))
        texts = [
            draw.choice(often) if draw.random() < 0.1 else " ".join(draw.choice(glosses)[: draw.randint(4, 16)])
            for _ in rows
        ]
        images = [draw.randrange(row + 1) if draw.random() < 0.1 else row for row in rows]
        values = {
            "key": [str(row) for row in rows],
            "caption": texts,
            "path": ["pool.tar"] * len(rows),
            "offset": list(rows),
            "size": [1] * len(rows),
            "width": [draw.randint(150, 900) for _ in rows],
            "height": [draw.randint(150, 900) for _ in rows],
            "digest": [image.to_bytes(16, "little") for image in images],
            "group": [""] * len(rows),
            "image": [None] * len(rows),
        }
        writer.write(pa.table(values, schema=schema))
    create(str(path), schema.with_metadata({FORMAT: FORMAT_VERSION, FINGERPRINT: "f" * 32}), writer.finish())


def write_dump(path: Path) -> int:
    """Write WordNet in the form of kaikki's Wiktionary, each entry as long as one is there, and return their number."""
    padding, count = {"forms": [{"form": "x" * 20, "tags": ["plural"]}] * 20, "sounds": ["y" * 60] * 10}, 0
    with path.open("w", encoding="utf-8") as file:
        for synset in load_wordnet().synsets:
            for word in synset.words:
                senses = [{"glosses": [synset.definition], "examples": [{"text": text} for text in synset.examples]}]
                file.write(json.dumps({"word": word, "pos": "noun", "senses": senses, **padding}) + "\n")
                count += 1
    return count


def run(code: str) -> list[float]:
    """Run code in a process of its own and return the numbers that it prints last."""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return list(json.loads(found.splitlines()[-1]))


def main() -> None:
    """Print a line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*PAIRS, "near", "wiktionary"])
    parser.add_argument("--pairs", type=int, help="pairs of the pool")
    arguments, results = parser.parse_args(), []

    def note(what: str, numbers: list[float]) -> None:
        count, seconds, used, gb, kept = numbers
        results.append({"what": what, "count": count, "seconds": seconds, "processor": used, "gb": gb, "kept": kept})
        print(
            f"{what:10} {count:>9,.0f}: {seconds:7.1f} s, {used:7.1f} s of a core, {count / used:9,.0f} a second of a"
            f" core, peak {gb:.2f} GB, kept {kept:.1%}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        for method, usual in PAIRS.items():
            if arguments.only in (None, method):
                for count in (number := arguments.pairs or usual) // 4, number:
                    pool = Path(folder) / f"{method}-{count}.lance"
                    write_pool(pool, count)
                    note(method, run(CURATE.format(catalog=str(pool), method=method, settings={})))
        if arguments.only in (None, "near"):
            note("near", run(NEAR))
        if arguments.only in (None, "wiktionary"):
            dump = Path(folder) / "dump.jsonl"
            count = write_dump(dump)
            print(f"dump: {dump.stat().st_size / 1e6:.0f} MB")
            note("wiktionary", run(WIKTIONARY.format(dump=str(dump), count=count)))
    facts = {"date": datetime.now(UTC).date().isoformat(), "machine": platform.machine(), "seed": 0}
    print(json.dumps(facts | {"results": results}))


if __name__ == "__main__":
    main()
