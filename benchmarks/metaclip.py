"""Captions a second that are matched with metadata: the plain substring scan, two automata in a Python loop, modeclip.

    python benchmarks/metaclip.py --icons @iconify/json      captions of all icons, 1,000,000 long ones, WordNet's names
    python benchmarks/metaclip.py --captions 200000 --entries 500000 --rounds 1

The long captions are two glosses of WordNet each, drawn with a seed. Entries are the names of WordNet's synsets; with
--entries as many more of words and pairs of words of the long captions as make that number. The scan looks for each
padded entry in each normalised caption. The automata (pip install "modeclip[benchmarks]") are
asked caption by caption. Everyone returns the set of entries of each caption, and all must agree. Rounds alternate, on
the same captions; rates are by the clock and by processor time, since the clock of a busy machine tells little. At the
end all captions are counted, a quarter of them and all of them in processes of their own, which tell their peak memory.
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

import numpy as np
import pyarrow as pa

from modeclip.curation.matching import Matcher, normalise, pad
from modeclip.curation.metadata import MetadataConfig, build, read_corpus, read_metadata, synset_names, write_metadata
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


def count_file(entries: Path, captions: Path, limit: int) -> None:
    """Count the matches of the first captions of a file, and print what that took."""
    matcher = Matcher(read_metadata(entries).entries)
    before = peak_gb()
    clock, processor = time.perf_counter(), time.process_time()
    totals, number, reading = np.zeros(matcher.num_entries), 0, islice(read_corpus(captions), limit)
    while block := list(islice(reading, LOOPED)):
        totals += matcher.match(block).total(matcher.num_entries)
        number += len(block)
    result = {
        "captions": number,
        "matches": int(totals.sum()),
        "clock": time.perf_counter() - clock,
        "processor": time.process_time() - processor,
        "peak_gb": peak_gb(),
        "before_gb": before,
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
    parser.add_argument("--count", nargs=3, metavar=("ENTRIES", "CAPTIONS", "LIMIT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count:
        count_file(Path(arguments.count[0]), Path(arguments.count[1]), int(arguments.count[2]))
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
        for limit in (arguments.captions // 4, arguments.captions):
            command = [sys.executable, __file__, "--count", f"{folder}/entries.txt", str(file), str(limit)]
            counted = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"\n{counted['captions']:,} captions counted, {counted['matches']:,} matches: {counted['clock']:.1f} s,"
                f" {counted['processor']:.1f} s of processor, peak memory {counted['peak_gb']:.2f} GB"
                f" ({counted['before_gb']:.2f} before)"
            )
            result[f"counted {limit}"] = counted
    result["met"] = all(
        found["to_scan"] >= SCAN_BAR and found["to_best_loop_processor"] >= LOOP_BAR
        for found in (result[name] for name in corpora)
    )
    print("\n" + json.dumps(result | {"bars": [SCAN_BAR, LOOP_BAR], "date": str(datetime.now(UTC).date())}))


if __name__ == "__main__":
    main()
