"""What `runs/rules_over_seeds.py` has recorded of the demo over several seeds, as a table and sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from records import interval, table

from modeclip.data.tasks.names import CLASS_NAMES
from modeclip.evaluation.deciding import DENSE
from modeclip.pipeline.known_names import ALL_NAMES, MIXTURE, NAMES

Line = Mapping[str, Any]


def read(path: Path) -> list[Line]:
    """Return the lines: one for each seed, and last the decision over all of them."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def points(gain: Mapping[str, float]) -> str:
    """Return a gain in points with its interval."""
    mean, low, high = (f"{100 * gain[name]:+.1f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})".replace("-", "\N{MINUS SIGN}")


def decision_table(lines: Sequence[Line]) -> str:
    """Return what each way gains over all seeds, and what it costs."""
    decision = lines[-1]["decision"]
    rows = []
    for row in decision["rows"]:
        cells = []
        for measure in (CLASS_NAMES, ALL_NAMES):
            gain = row["gain"].get(measure)
            cells += [f"{100 * row['score'][measure]:.1f}", points(gain) if gain else ""]
        cost = [f"{row['samples']:,}", f"{row['towers']:.3g}", f"{row['megabytes']:.1f}"]
        rows.append([row["title"], *cells, *cost])
    asked = decision["questions"]
    columns = [f"{len(decision['classnames'])} names, %", "gain", "all names, %", "gain", "samples", "towers", "MB"]
    said = (
        f"{decision['seeds']} seeds; {asked[CLASS_NAMES]:,} held-out pictures of the names, {asked[ALL_NAMES]:,} in "
        f"all; the intervals of a column hold together with 95 %; {facts(lines)}. By the rule of `modeclip pilot`: "
        f"*{decision['verdict']['sentence']}* {decision['caution']}"
    )
    return f"{table(['way to train', *columns], rows)}\n\n{said}"


def facts(lines: Sequence[Line]) -> str:
    """Return where and when the record was made."""
    machine, days = lines[0]["machine"], sorted({line["date"] for line in lines[:-1]})
    return f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, {' to '.join(days)}"


def in_short(lines: Sequence[Line]) -> str:
    """Return what README says of the demo over all seeds."""
    decision, seeds = lines[-1]["decision"], lines[:-1]
    ways = {row["name"]: row["gain"] for row in decision["rows"]}
    names, mixture = ways[NAMES], ways[MIXTURE]
    routed, uniform = ([line["average"][f"mixture, {rule}"] for line in seeds] for rule in ("per_class", "uniform"))
    gain = interval([mine - other for mine, other in zip(routed, uniform, strict=True)])
    best = [line["average"]["oracle"] for line in seeds]
    return (
        f"Over {decision['seeds']} seeds (`python runs/rules_over_seeds.py`, [table and rule]"
        f"(docs/results.md#the-demo)): one expert for the {len(decision['classnames'])} names stands at "
        f"{points(names[CLASS_NAMES])} points on them against one dense model of the same cost, and at "
        f"{points(names[ALL_NAMES])} where all names are asked; the mixture of four experts on clusters of captions at "
        f"{points(mixture[CLASS_NAMES])} and {points(mixture[ALL_NAMES])}. Letting each class choose its experts "
        f"(`per_class`, the default) stands at {'' if gain.startswith('-') else '+'}{gain} against equal weights, and "
        f"reaches {sum(routed) / len(routed):.1f} % where the best expert of each task, chosen by the labels, reaches "
        f"{sum(best) / len(best):.1f}."
    )


def short_in_short(lines: Sequence[Line]) -> str:
    """Return what README says of the same question after a shorter training of smaller towers."""
    decision = lines[-1]["decision"]
    rows = {row["name"]: row for row in decision["rows"]}
    own = rows[NAMES]
    return (
        f"With smaller towers and {own['samples']:,} samples in place of the demo's ([table and command]"
        "(docs/results.md#the-demo)), the same expert stands at "
        f"{points(own['gain'][CLASS_NAMES])} points on its names "
        f"({100 * own['score'][CLASS_NAMES]:.1f} % against {100 * rows[DENSE]['score'][CLASS_NAMES]:.1f} %, "
        f"{decision['seeds']} seeds)."
    )


def tables(long: Path, short: Path) -> dict[str, str]:
    """Return the blocks of the pages by their names; none where nothing is recorded yet."""
    found = {}
    if long.exists():
        lines = read(long)
        found |= {"demo": decision_table(lines), "demo-seeds": in_short(lines)}
    if short.exists():
        lines = read(short)
        found |= {"demo-short": decision_table(lines), "demo-short-brief": short_in_short(lines)}
    return found
