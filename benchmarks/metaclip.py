"""Captions a second that are matched with metadata: the plain substring scan, two automata in a Python loop, modeclip.

    python benchmarks/metaclip.py --icons @iconify/json      captions of all icons, 1,000,000 long ones, WordNet's names
    python benchmarks/metaclip.py --captions 200000 --entries 500000 --rounds 1

The long captions are two glosses of WordNet each, drawn with a seed. Entries are the names of WordNet's synsets; with
--entries as many more of words and pairs of words of the long captions as make that number. The scan looks for each
padded entry in each normalised caption. The automata (pip install "modeclip[benchmarks]") are asked caption by
caption. Everyone returns the set of entries of each caption, and all must agree. Rounds alternate, on the same
captions; rates are by the clock and by processor time, since the clock of a busy machine tells little. At the end
`curate` balances a catalog of the long captions, a quarter of them and all of them in processes of their own, which
tell their peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa

from modeclip.curation.matching import Matcher, normalise, pad
from modeclip.curation.metadata import MetadataConfig, build, read_corpus, synset_names, write_metadata
from modeclip.data.wordnet import load_wordnet

SCAN_BAR, LOOP_BAR = 500.0, 1.5
SCANNED = 60
"""Captions of a round for the scan, which takes 10 ms for each."""
LOOPED = 65_536
"""Captions of a round for all others: one fragment of a catalog."""


def icon_captions(package: Path) -> list[str]:
    """Return the captions of all icons of npm's @iconify/json, without drawing them."""
    from modeclip.data.sources.iconify import iconify_caption, variant_pattern

    captions = []
    for file in sorted((package / "json").glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        variants = variant_pattern(content)
        captions += [iconify_caption(icon, variants) for icon in sorted(content["icons"])]
    return captions


def gloss_captions(definitions: Sequence[str], count: int) -> Iterator[str]:
    """Yield captions of two glosses each."""
    rng = random.Random(0)
    for _ in range(count):
        yield f"{rng.choice(definitions)}, {rng.choice(definitions)}"


def scan(padded: Sequence[str], captions: Sequence[str]) -> list[list[int]]:
    """Look for each entry in each caption."""
    return [[n for n, entry in enumerate(padded) if entry in text] for text in map(normalise, captions)]


def loops(padded: Sequence[str]) -> dict[str, Callable[[Sequence[str]], list[set[int]]]]:
    """Return the automata that are installed, each in a Python loop over captions."""
    import ahocorasick
    import ahocorasick_rs

    rust = ahocorasick_rs.AhoCorasick(
        padded, store_patterns=False, implementation=ahocorasick_rs.Implementation.ContiguousNFA
    )
    c = ahocorasick.Automaton()
    for number, entry in enumerate(padded):
        c.add_word(entry, number)
    c.make_automaton()

    def by_rust(captions: Sequence[str]) -> list[set[int]]:
        return [
            {found[0] for found in rust.find_matches_as_indexes(normalise(caption), overlapping=True)}
            for caption in captions
        ]

    def by_c(captions: Sequence[str]) -> list[set[int]]:
        return [{found for _, found in c.iter(normalise(caption))} for caption in captions]

    return {"ahocorasick_rs": by_rust, "pyahocorasick": by_c}


def timed(work: Callable[[Sequence[str]], Any], captions: Sequence[str]) -> tuple[float, float, Any]:
    """Return captions a second by the clock and by processor time, and the result."""
    clock, processor = time.perf_counter(), time.process_time()
    result = work(captions)
    return len(captions) / (time.perf_counter() - clock), len(captions) / (time.process_time() - processor), result


def measure(entries: Sequence[str], captions: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Let all match the same captions in turn, and return their median rates."""
    padded, matcher, threads = [pad(entry) for entry in entries], Matcher(entries), pa.cpu_count()
    rates: dict[str, list[tuple[float, float]]] = {}
    others = loops(padded)
    for number in range(rounds):
        some = captions[number * LOOPED : (number + 1) * LOOPED] or captions[:LOOPED]
        wall, processor, scanned = timed(lambda few: scan(padded, few), some[:SCANNED])
        rates.setdefault("substring scan", []).append((wall, processor))
        pa.set_cpu_count(1)
        wall, processor, ours = timed(matcher.match, some)
        rates.setdefault("modeclip, one thread", []).append((wall, processor))
        pa.set_cpu_count(threads)
        wall, processor, _ = timed(matcher.match, some)
        rates.setdefault(f"modeclip, {threads} threads", []).append((wall, processor))
        for name, loop in others.items():
            wall, processor, found = timed(loop, some)
            rates.setdefault(name, []).append((wall, processor))
            assert [sorted(one) for one in found] == [ours[place] for place in range(len(some))], name
        assert scanned == [ours[place] for place in range(len(scanned))]
    return {
        name: {"clock": median(wall for wall, _ in pairs), "processor": median(processor for _, processor in pairs)}
        for name, pairs in rates.items()
    }


def peak_gb() -> float:
    """Return the peak memory of this process, which the kernel's rusage would mix up with that of its parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def write_catalog(path: Path, captions: Sequence[str] | Iterator[str]) -> None:
    """Write a catalog of captions whose images nobody will read."""
    from modeclip.data.catalog import FINGERPRINT, FORMAT, FORMAT_VERSION, PAIR_COLUMNS
    from modeclip.data.storage import FileWriter, create

    schema = pa.schema([field for field in PAIR_COLUMNS.items() if field[0] != "task"])
    writer, number, reading = FileWriter(str(path), schema), 0, iter(captions)
    while block := list(islice(reading, LOOPED)):
        columns = {"key": [f"{number + place:09d}" for place in range(len(block))], "caption": block}
        number += len(block)
        empty = {name: pa.nulls(len(block), kind) for name, kind in PAIR_COLUMNS.items() if name != "task"}
        writer.write(pa.table(empty | columns, schema=schema))
    metadata = {FORMAT: FORMAT_VERSION, FINGERPRINT: f"{number:032d}"}
    create(str(path), schema.with_metadata(metadata), writer.finish())


def curate_catalog(path: Path, entries: Path) -> None:
    """Curate a catalog, and print what that took."""
    from modeclip.curation.curating import curate
    from modeclip.curation.metaclip import MetaclipConfig
    from modeclip.data.catalog import Catalog

    catalog, before = Catalog.open(path), peak_gb()
    clock, processor = time.perf_counter(), time.process_time()
    curated = curate(catalog, MetaclipConfig(entries=str(entries)))
    result = {
        "pairs": len(catalog),
        "kept": int(curated.column("kept").sum()),
        "clock": round(time.perf_counter() - clock, 2),
        "processor": round(time.process_time() - processor, 2),
        "peak_gb": round(peak_gb(), 3),
        "before_gb": round(before, 3),
    }
    print(json.dumps(result))


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, help="unpacked package @iconify/json")
    parser.add_argument("--captions", type=int, default=1_000_000, help="long captions")
    parser.add_argument("--entries", type=int, default=0, help="entries at least; more than WordNet has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wordnet", help="folder of WordNet's files")
    parser.add_argument("--curate", nargs=2, metavar=("CATALOG", "ENTRIES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.curate:
        curate_catalog(*map(Path, arguments.curate))
        return
    wordnet = load_wordnet(arguments.wordnet)
    entries = synset_names(wordnet)
    definitions = [synset.definition for synset in wordnet.synsets]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "captions.txt")
        with file.open("w", encoding="utf-8") as out:
            out.writelines(f"{caption}\n" for caption in gloss_captions(definitions, arguments.captions))
        if arguments.entries:
            config = MetadataConfig(min_count=1, min_pmi=-100.0, max_entries=arguments.entries)
            entries = build(read_corpus(file), config, synsets=entries)
        write_metadata(Path(folder, "entries.txt"), entries)
        corpora = {"long captions": list(islice(read_corpus(file), arguments.rounds * LOOPED))}
        if arguments.icons:
            icons = icon_captions(arguments.icons)
            random.Random(0).shuffle(icons)
            corpora = {"icons": icons} | corpora
        print(
            f"{datetime.now(UTC).date()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
            f" at the start, {len(entries):,} entries"
        )
        result: dict[str, Any] = {"benchmark": "metaclip", "entries": len(entries), "rounds": arguments.rounds}
        for name, captions in corpora.items():
            characters = sum(map(len, captions)) / len(captions)
            print(f"\n{name}: {len(captions):,} ({len(set(captions)):,} distinct), {characters:.0f} characters each")
            print(f"{'':<24}{'captions a second':>20}{'a second of processor':>24}")
            rates = measure(entries, captions, arguments.rounds)
            for who, rate in rates.items():
                print(f"{who:<24}{rate['clock']:>20,.0f}{rate['processor']:>24,.0f}")
            best = max(("ahocorasick_rs", "pyahocorasick"), key=lambda who: rates[who]["processor"])
            ours, one = rates[f"modeclip, {pa.cpu_count()} threads"], rates["modeclip, one thread"]
            result[name] = {
                "to_scan": round(one["processor"] / rates["substring scan"]["processor"]),
                "to_best_loop_processor": round(one["processor"] / rates[best]["processor"], 2),
                "to_best_loop_clock": round(ours["clock"] / rates[best]["clock"], 2),
                "best_loop": best,
            }
        for number in (arguments.captions // 4, arguments.captions):
            path = Path(folder, f"{number}.lance")
            write_catalog(path, islice(read_corpus(file), number))
            command = [sys.executable, __file__, "--curate", str(path), f"{folder}/entries.txt"]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            curated = json.loads(answer.splitlines()[-1])
            print(
                f"\n{curated['pairs']:,} pairs curated: {curated['clock']} s, {curated['processor']} s of processor,"
                f" peak memory {curated['peak_gb']} GB ({curated['before_gb']} before)"
            )
            result[f"curate {number}"] = curated
    result["met"] = all(
        found["to_scan"] >= SCAN_BAR and found["to_best_loop_processor"] >= LOOP_BAR
        for found in (result[name] for name in corpora)
    )
    print("\n" + json.dumps(result | {"bars": [SCAN_BAR, LOOP_BAR], "date": str(datetime.now(UTC).date())}))


if __name__ == "__main__":
    main()
