"""Says what each curation of a noisy catalog has found of each kind of noise, and what clean pairs it cost.

    python runs/noise.py icons/catalog.lance noisy
    python runs/noise_found.py noisy --curate                 the methods that need no model, with settings for icons
    modeclip curate noisy dfn --filter MODEL --fraction 0.7   any other
    python runs/noise_found.py noisy --out runs/noise.jsonl
    python runs/noise_found.py runs/curation/pool --plan runs/curate.yaml     the selections of runs/curation.py

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
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
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


def planned(catalog: Catalog, plan: Path) -> dict[str, str]:
    """Return the selections of a plan that a catalog has, each with the name of its last curation."""
    selections = yaml.safe_load(plan.read_text(encoding="utf-8"))["selections"]
    last = {name: f"c{n}_{len(steps) - 1}" for n, (name, steps) in enumerate(selections.items()) if len(steps)}
    return {name: column for name, column in last.items() if f"{column}_cause" in catalog.columns}


def noise_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return recall and precision in percent of each curation of the records, by kind of noise, as Markdown."""
    kinds = [*sorted({line["noise"] for line in lines} - {"all"}), "all"]
    by_curation: dict[str, dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        by_curation.setdefault(line["curation"], {})[line["noise"]] = line
    rows = []
    for name, of_kind in by_curation.items():
        cells = []
        for kind in kinds:
            line = of_kind.get(kind, {"recall": 0.0, "precision": None})
            recall, precision = f"{100 * line['recall']:.0f}", line["precision"]
            cells.append(recall if recall == "0" or precision is None else f"{recall} / {100 * precision:.0f}")
        rows.append(f"| {name} | {' | '.join(cells)} | {100 * of_kind['all']['clean']:.1f} |")
    head = f"| curation | {' | '.join(kinds)} | clean dropped |\n|---{'|---:' * (len(kinds) + 1)}|"
    return "\n".join([head, *rows])


def main() -> None:
    """Print the table and add the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalog", help="catalog that runs/noise.py made")
    parser.add_argument("--curate", action="store_true", help="make the curations of METHODS first")
    parser.add_argument("--seed", type=int, default=0, help="seed that the noise was made with, for the record")
    parser.add_argument("--plan", type=Path, help="plan of runs/curation.py, for its pool: what each selection drops")
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
    names = {name: name for name in curations_of(catalog)}
    records = []
    for title, name in (planned(catalog, arguments.plan) if arguments.plan else names).items():
        dropped = dropped_of(catalog, name)
        if arguments.plan:
            dropped[np.isnan(dropped)] = 1  # by the steps before it
        facts = catalog.facts(f"{name}_cause") or {}
        record = {"curation": title, "method": facts.get("method"), "config": facts.get("config")}
        record |= {"study": True} if arguments.plan else {}
        record |= {"seed": arguments.seed, "machine": machine(), "date": str(datetime.now(UTC).date())}
        records += [record | line for line in found(pairs["noise"], pairs["origin"], dropped)]
    print(f"{datetime.now(UTC).date()}, {machine()}, {len(catalog):,} pairs; recall / precision in %\n")
    print(noise_table(records))
    if arguments.out:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    main()
