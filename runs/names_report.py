"""One expert for known names on every held-out icon set: what each gains on its own set, in tables and words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from experiments import PARTS
from findings import Gain
from records import Records, table
from scipy.stats import spearmanr

STUDY = "names"
KINDS: Mapping[str, str] = {
    "prior": "an expert of the clusters nearest to the names",
    "named": "an expert of the pairs whose caption is a name",
}
"""Kinds of arms, and what they train."""
FEWEST_RANKED = 10
"""Sets from which on a rank correlation is told."""


@dataclass(frozen=True, kw_only=True)
class OnSet:
    """What an expert for the names of a set does, a number for each random seed."""

    task: str
    seeds: list[int]
    """The random seeds."""
    pairs: float
    """Pairs that it was trained on after the seed model."""
    dense: list[float]
    """What the dense model of equal cost reaches on its own set, in percent."""
    own: list[float]
    """Gain over the dense model of equal cost on its own set, in points."""
    others: list[float]
    """The same in the mean over all other sets."""


def read(records: Records, kind: str) -> list[OnSet]:
    """Return the experts of a kind that were measured, in the order of the plan."""
    dense, names, found = records.equal(STUDY, PARTS), records.data["tasks"], []
    for arm in records.studies[STUDY].arms:
        rows = records.values(STUDY, arm.name) if arm.kind == kind else {}
        if seeds := sorted(seed for seed in rows if seed in dense):
            own = np.array([arm.task == name for name in names])
            gains = [np.array(rows[seed]["tasks"]) - dense[seed] for seed in seeds]
            on_set = OnSet(
                task=arm.task,
                seeds=seeds,
                pairs=float(np.mean([rows[seed]["pairs"][0] for seed in seeds])),
                dense=[float(dense[seed][own][0]) for seed in seeds],
                own=[float(gain[own][0]) for gain in gains],
                others=[float(gain[~own].mean()) for gain in gains],
            )
            found.append(on_set)
    return found


def names_table(records: Records) -> str:
    """Return what each expert gains on its own set, the largest gain first."""
    by_kind = {kind: {one.task: one for one in read(records, kind)} for kind in KINDS}
    classes = dict(zip(records.asked["tasks"], records.asked["classes"], strict=True))
    rows = []
    for task in sorted(by_kind["prior"], key=lambda task: -np.mean(by_kind["prior"][task].own)):
        cells = [task, f"{classes[task]:,}", f"{np.mean(by_kind['prior'][task].dense):.1f}"]
        for kind in KINDS:
            one = by_kind[kind].get(task)
            cells += [f"{one.pairs:,.0f}", f"{np.mean(one.own):+.1f}"] if one else ["", ""]
        rows.append(cells)
    columns = ["set", "names", "dense", "pairs of the clusters", "gain", "pairs with such a caption", "gain"]
    return table(columns, rows)


def found(records: Records) -> str:
    """Return what the experts gain on average over the sets."""
    parts = []
    for kind, words in KINDS.items():
        if experts := read(records, kind):
            own = Gain([float(np.mean(one.own)) for one in experts])
            others = Gain([float(np.mean(one.others)) for one in experts])
            better = sum(gain > 0 for gain in own.values)
            verdict = "it helps" if own.is_certain and own.mean > 0 else "it does not help for certain"
            parts.append(
                f"- **{words[0].upper()}{words[1:]}** stands at {own} points against the dense model of equal cost on "
                f"its own set (95 % over {len(own.values)} sets, {over_seeds(experts)}), is better on {better} of "
                "them, "
                f"and stands at {others} on the other sets: {verdict}{_by_pairs(experts)}."
            )
    if len(apart := apart_by_set(records)) > 1:
        parts.append(
            f"- Against each other, in the seeds that both have: named pairs {Gain(apart)} against clusters, over "
            f"{len(apart)} sets."
        )
    return "\n".join(parts) or "Not measured yet."


def apart_by_set(records: Records) -> list[float]:
    """Return by how much named pairs are better than clusters on each set, in the seeds that both have."""
    prior, named = ({one.task: dict(zip(one.seeds, one.own, strict=True)) for one in read(records, k)} for k in KINDS)
    both = {
        task: [gain - prior[task][seed] for seed, gain in own.items() if seed in prior[task]]
        for task, own in named.items()
        if task in prior
    }
    return [float(np.mean(gains)) for gains in both.values() if gains]


def over_seeds(experts: list[OnSet]) -> str:
    """Return over how many random seeds experts were trained, and what the mean over the sets is in each."""
    by_seed: dict[int, list[float]] = {}
    for one in experts:
        for seed, gain in zip(one.seeds, one.own, strict=True):
            by_seed.setdefault(seed, []).append(gain)
    whole = [float(np.mean(gains)) for gains in by_seed.values() if len(gains) == len(experts)]
    return seeds_of(experts) + (f", {Gain(whole)} over them" if len(whole) > 1 else "")


def in_short(records: Records) -> str:
    """Return what README says of it; nothing where it is not measured."""
    kinds = {kind: read(records, kind) for kind in KINDS}
    if not all(kinds.values()):
        return ""
    own = {kind: Gain([float(np.mean(one.own)) for one in experts]) for kind, experts in kinds.items()}
    prior, named = own["prior"], own["named"]
    study = records.studies[STUDY]
    passes = study.train.samples / records.data["pairs"]
    return (
        f"- on each of {len(prior.values)} held-out icon sets, none chosen, such an expert of the clusters nearest to "
        f"the set's names stands at {prior} ({seeds_of(kinds['prior'])}), and one of the pairs alone whose caption is "
        f"one of the names at {named} ({seeds_of(kinds['named'])}), better on {sum(g > 0 for g in named.values)} of "
        f"them, after {passes:.1f} passes over all pairs (intervals over the sets, "
        "[each set](docs/results.md#on-every-set-none-chosen));"
    )


def seeds_of(experts: list[OnSet]) -> str:
    """Return how many random seeds experts have, in words."""
    counts = sorted({len(one.own) for one in experts})
    if counts == [1]:
        return "one random seed"
    return f"{counts[0]} random seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} random seeds"


def _by_pairs(experts: list[OnSet]) -> str:
    """Return whether experts of fewer pairs gain more."""
    if len(experts) < FEWEST_RANKED:
        return ""
    rank = spearmanr([one.pairs for one in experts], [float(np.mean(one.own)) for one in experts])
    said = "the number of pairs that the names choose says nothing certain of it"
    if rank.pvalue < 0.05:
        said = f"the fewer pairs the names choose, the {'more' if rank.statistic < 0 else 'less'} it gains"
    return f"; {said} (Spearman {rank.statistic:+.2f}, p {rank.pvalue:.3f})"
