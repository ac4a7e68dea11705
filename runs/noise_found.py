"""Says what each curation of a noisy catalog has found of each kind of noise, and what clean pairs it cost.

    python runs/noise.py icons/catalog.lance noisy
    python runs/noise_found.py noisy --curate                 the methods that need no model, with settings for icons
    modeclip curate noisy dfn --filter MODEL --fraction 0.7   any other
    python runs/noise_found.py noisy --out runs/noise.jsonl

For each curation of the catalog (columns NAME_cause) and each kind of noise (column ``noise`` of `runs/noise.py`):

    recall     share of the noisy pairs of this kind that are dropped
    precision  of all dropped pairs that are of this kind or clean, the share that is of this kind
    clean      share of the clean pairs that are dropped

A copy counts as found if it or the pair that it was made of is dropped, and a clean pair that is dropped while its copy
stays is no loss. Pairs that are kept with a probability count by it. Each line of JSON has machine, seed and date.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from noise import CLEAN, COPIES

from modeclip.curation.curating import curate, curations_of, load_method
from modeclip.curation.method import OUTSIDE
from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "align_small": ("align", {"preset": "small"}),
    "metaclip": ("metaclip", {"entries": "wordnet", "t": 20}),
    "exact": ("duplicates", {}),
    "pixels": ("duplicates", {"pixels": True}),
    "perceptual": ("duplicates", {"by": "perceptual"}),
    "semantic": ("duplicates", {"by": "semantic"}),
    "semantic_chain": ("duplicates", {"by": "semantic", "chain": True}),
    "density": ("duplicates", {"by": "density", "kept_fraction": 0.7}),
    "balanced": ("duplicates", {"by": "balanced", "kept_fraction": 0.7}),
}
"""Curations that ``--curate`` makes, by name: the method and its settings."""


def machine() -> str:
    """Return the processor's name and the number of cores."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if "model name" in line] if path.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores"


def dropped_of(catalog: Catalog, name: str) -> np.ndarray:
    """Return for each pair how much of it a curation drops, from 0 to 1; NaN outside of what it was given."""
    cause = catalog.read([f"{name}_cause"])[f"{name}_cause"]
    dropped = (cause != 0).astype(float)
    if f"{name}_probability" in catalog.columns:
        dropped = 1 - np.where(cause == 0, catalog.read([f"{name}_probability"])[f"{name}_probability"], 0)
    return np.where(cause == OUTSIDE, np.nan, dropped)


def found(noise: np.ndarray, origin: np.ndarray, dropped: np.ndarray) -> list[dict[str, Any]]:
    """Return recall, precision and what was lost for each kind of noise."""
    looked_at = ~np.isnan(dropped)
    noise, origin, dropped = noise[looked_at], origin[looked_at], dropped[looked_at].copy()
    is_copy, is_clean = np.isin(noise, list(COPIES)), noise == CLEAN
    place_of = {key: place for place, key in zip(np.flatnonzero(is_clean).tolist(), origin[is_clean], strict=True)}
    for place in np.flatnonzero(is_copy).tolist():  # what one of two loses is the copy's first
        source = place_of.get(origin[place])
        if source is not None:
            both = dropped[place] + dropped[source]
            dropped[place], dropped[source] = min(both, 1), max(both - 1, 0)
    lost = float(dropped[is_clean].sum())
    lines = []
    for kind in sorted(set(noise.tolist()) - {CLEAN}):
        hits = float(dropped[noise == kind].sum())
        lines.append(
            {
                "noise": kind,
                "pairs": int((noise == kind).sum()),
                "recall": round(hits / (noise == kind).sum(), 4),
                "precision": round(hits / (hits + lost), 4) if hits + lost else None,
            }
        )
    total = float(dropped[~is_clean].sum())
    lines.append(
        {
            "noise": "all",
            "pairs": int((~is_clean).sum()),
            "recall": round(total / max((~is_clean).sum(), 1), 4),
            "precision": round(total / (total + lost), 4) if total + lost else None,
            "clean": round(lost / max(is_clean.sum(), 1), 4),
        }
    )
    return lines


def main() -> None:
    """Print the tables and add the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalog", help="catalog that runs/noise.py made")
    parser.add_argument("--curate", action="store_true", help="make the curations of METHODS first")
    parser.add_argument("--seed", type=int, default=0, help="seed that the noise was made with, for the record")
    parser.add_argument("--out", type=Path, help="file to add lines of JSON to")
    arguments = parser.parse_args()
    catalog = Catalog.open(arguments.catalog)
    for name, (method, settings) in METHODS.items() if arguments.curate else ():
        try:
            curate(catalog, load_method(method)(**settings), name=name)
        except ModeclipError as error:
            print(f"{name}: left out: {error}")
    catalog = Catalog.open(arguments.catalog)
    pairs = catalog.read(["noise", "origin"])
    print(f"{datetime.now(UTC).date()}, {machine()}, {len(catalog):,} pairs; recall / precision in %\n")
    kinds = [*sorted(set(pairs["noise"].tolist()) - {CLEAN}), "all"]
    print("| curation | " + " | ".join(kinds) + " | clean dropped |\n" + "|---" * (len(kinds) + 2) + "|")
    for name in curations_of(catalog):
        lines = found(pairs["noise"], pairs["origin"], dropped_of(catalog, name))
        by_kind = {line["noise"]: line for line in lines}
        cells = []
        for kind in kinds:
            line = by_kind.get(kind)
            precision = "-" if line is None or line["precision"] is None else f"{100 * line['precision']:.0f}"
            cells.append("" if line is None else f"{100 * line['recall']:.0f} / {precision}")
        print(f"| {name} | " + " | ".join(cells) + f" | {100 * by_kind['all']['clean']:.1f} |", flush=True)
        if arguments.out:
            facts = catalog.facts(f"{name}_cause") or {}
            record = {"curation": name, "method": facts.get("method"), "config": facts.get("config")}
            record |= {"seed": arguments.seed, "machine": machine(), "date": str(datetime.now(UTC).date())}
            with arguments.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record | line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
