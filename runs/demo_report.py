"""What is recorded of the demo over several seeds, as tables and sentences.

`runs/rules_over_seeds.py` has asked its recipe, `modeclip pilot` its pilot (docs/pilot.md has the command).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from records import table

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


def pilot_in_short(result: Mapping[str, Any]) -> str:
    """Return what README says of the demo's pilot over all seeds."""
    own = next(row for row in result["rows"] if row["name"] == NAMES)["gain"]
    others = [row["gain"][CLASS_NAMES] for row in result["rows"] if row["name"] not in {NAMES, DENSE}]
    none = "no other way does" if all(gain["low"] <= 0 for gain in others) else "it is not alone"
    return (
        f"One seed says at most *likely*. Over {result['plan']['seeds']} seeds the expert for the names gains "
        f"{points(own[CLASS_NAMES])} points on them and {none} ([all rows](docs/pilot.md#on-the-built-in-icons)). It "
        f"is worse on everything else, {points(own['retrieval'])} where any caption is searched, so ask it about its "
        "names alone."
    )


def in_short(long: Sequence[Line], short: Sequence[Line]) -> str:
    """Return what README says of the same expert at other lengths over all seeds."""
    rows, brief = ({row["name"]: row for row in lines[-1]["decision"]["rows"]} for lines in (long, short))
    return (
        f"Another length may have another answer: trained as the models that searched above were, "
        f"{rows[NAMES]['samples']:,} samples on larger towers, such an expert stands at "
        f"{points(rows[NAMES]['gain'][CLASS_NAMES])} on whole icon sets that were held out, and the mixture itself at "
        f"{points(rows[MIXTURE]['gain'][ALL_NAMES])} on all their names, against one dense model of the same cost; "
        f"after {brief[NAMES]['samples']:,} samples the expert is at {points(brief[NAMES]['gain'][CLASS_NAMES])} there "
        f"({long[-1]['decision']['seeds']} seeds, [both tables](docs/results.md#the-demo))."
    )


def tables(long: Path, short: Path, pilot: Path) -> dict[str, str]:
    """Return the blocks of the pages by their names."""
    whole, brief = read(long), read(short)
    return {
        "demo": decision_table(whole),
        "demo-short": decision_table(brief),
        "demo-seeds": in_short(whole, brief),
        "demo-pilot": pilot_in_short(json.loads(pilot.read_text(encoding="utf-8"))),
    }
