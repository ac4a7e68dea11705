"""What the records of `runs/curation.py` say: which curation pays, by how much, and at what cost.

A gain is taken against the raw pool with the same seed. Three seeds of one selection say little about their own
scatter, so all selections that have all seeds share one: what is left of the averages when the mean of each selection
and of each seed is taken off (two-way analysis of variance). Intervals are 95 % by Student's t with its degrees of
freedom. What pays is tested for every selection that a user could choose, and the p-values are corrected for their
number by Holm's rule. The oracle is not among them, since nobody else knows the noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from records import interval, table
from scipy.stats import t, ttest_1samp

from modeclip.pages.charts import Axis
from modeclip.pages.html import write_page

Lines = Sequence[Mapping[str, Any]]
RAW, ORACLE, CLEAN = "raw", "oracle", "clean"
TWICE = "raw, twice the samples"
LEVEL = 0.05
"""Chance of saying that anything pays, or loses, where nothing does."""
FAMILIES = ("metaclip", "align", "dfn", "klite", "duplicates", "several")
"""Methods in the order of their colours; ``several`` in a row."""
WIDTH, ROW_HEIGHT, NAMES_WIDTH, NUMBERS_WIDTH = 1080.0, 27.0, 292.0, 128.0
"""Pixels of the chart of gains: of the whole, of a row, and of what stands left and right of the axis."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How much more, or less, a selection reaches than another one, in percentage points."""

    selection: str
    of_seed: Mapping[int, float]
    """Its differences, for each seed that both have."""
    half: float | None = None
    """Half width of the 95 % interval; None where some seeds are missing."""
    chance: float | None = None
    """p-value of no difference, before the correction."""
    corrected: float | None = None
    """p-value after the correction; None where nothing is tested."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(list(self.of_seed.values())))

    @property
    def verdict(self) -> str:
        """Say whether it pays: ``pays``, ``loses``, ``open`` (within chance), or nothing where it was not tested."""
        if self.corrected is None:
            return ""
        return "open" if self.corrected >= LEVEL else "pays" if self.mean > 0 else "loses"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file; none where it is not there yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def averages(lines: Lines) -> dict[str, dict[int, float]]:
    """Return the mean over the held-out tasks in percent, by selection and seed."""
    scores: dict[str, dict[int, float]] = {}
    for line in lines:
        scores.setdefault(line["selection"], {})[line["seed"]] = float(np.mean(list(line["tasks"].values())))
    return scores


def gains(lines: Lines) -> list[Gain]:
    """Return what each selection gains on the raw pool, the most first; nothing without a raw pool.

    A seed counts once more than half of the selections have it, so that one seed more takes no interval away.
    """
    scores = averages(lines)
    common = [seed for seed in scores.get(RAW, {}) if 2 * sum(seed in own for own in scores.values()) > len(scores)]
    raw = {seed: scores[RAW][seed] for seed in common}
    error, degrees = _error({name: values for name, values in scores.items() if values.keys() >= raw.keys()}, list(raw))
    found = []
    for name, values in scores.items():
        of_seed = {seed: values[seed] - raw[seed] for seed in sorted(raw) if seed in values}
        if name == RAW or not of_seed:
            continue
        gain = Gain(selection=name, of_seed=of_seed)
        if error and len(of_seed) == len(raw):
            chance = 2 * float(t.sf(abs(gain.mean) / error, degrees))
            gain = Gain(selection=name, of_seed=of_seed, half=float(t.ppf(0.975, degrees)) * error, chance=chance)
        found.append(gain)
    tested = [gain for gain in found if gain.chance is not None and gain.selection != ORACLE]
    corrected = dict(
        zip((gain.selection for gain in tested), holm([gain.chance or 0.0 for gain in tested]), strict=True)
    )
    found = [Gain(**vars(gain) | {"corrected": corrected.get(gain.selection)}) for gain in found]
    return sorted(found, key=lambda gain: -gain.mean)


def _error(scores: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> tuple[float, int]:
    """Return the standard error of a mean difference of two selections, and its degrees of freedom."""
    if len(scores) < 2 or len(seeds) < 2:
        return 0.0, 0
    values = np.array([[own[seed] for seed in seeds] for own in scores.values()])
    left = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    degrees = (len(scores) - 1) * (len(seeds) - 1)
    return float(np.sqrt(2 * (left**2).sum() / degrees / len(seeds))), degrees


def holm(chances: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's rule.

    Examples:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected, floor = [0.0] * len(chances), 0.0
    for place, index in enumerate(np.argsort(chances, kind="stable").tolist()):
        floor = max(floor, min(1.0, (len(chances) - place) * chances[index]))
        corrected[index] = floor
    return corrected


def verdict(lines: Lines) -> str:
    """Return what pays at equal samples, and whether that also pays for the training of a filter."""
    found, tested = gains(lines), _tested(lines)
    if not tested:
        return "Not measured with several seeds yet, so there is no verdict."

    def some(kind: str, otherwise: str) -> str:
        chosen = [gain for gain in tested if gain.verdict == kind]
        chosen = chosen[::-1] if kind == "loses" else chosen
        names = ", ".join(f"{gain.selection} {_signed(gain.mean)}" for gain in chosen)
        return f"{len(chosen)} {kind.removesuffix('s') if len(chosen) > 1 else kind} ({names})" if chosen else otherwise

    own = averages(lines)[RAW]
    raw = [own[seed] for seed in max((gain.of_seed for gain in tested), key=len)]
    still = sum(gain.verdict == "open" for gain in tested)
    oracle = next((gain for gain in found if gain.selection == ORACLE), None)
    return (
        f"Of {len(tested)} selections against the raw pool at equal samples ({interval(raw)} %, {len(raw)} seeds; "
        f"Holm's correction, {100 * LEVEL:.0f} %), {some('pays', 'none pays')}, {some('loses', 'none loses')}, and the "
        f"difference of {still} is within chance"
        + (f"; an oracle that trains on the clean pairs alone is at {_signed(oracle.mean)}." if oracle else ".")
        + _cost_of_a_filter(tested, next((gain for gain in found if gain.selection == TWICE), None))
    )


def _tested(lines: Lines) -> list[Gain]:
    """Return the gains that were tested of dense models that saw as many samples as that of the raw pool."""
    last = _last(lines)
    equal = {name for name, line in last.items() if line["samples"] == last[RAW]["samples"]} if RAW in last else set()
    return [
        gain
        for gain in gains(lines)
        if gain.corrected is not None and gain.selection in equal and not is_mixture(gain.selection)
    ]


def brief(lines: Lines) -> str:
    """Return the verdict for those who read one sentence."""
    tested = _tested(lines)
    if not tested:
        return "Not measured with several seeds yet."
    raw, best = averages(lines)[RAW], tested[0]
    pays, loses = (sum(gain.verdict == kind for gain in tested) for kind in ("pays", "loses"))
    return (
        f"On a pool of icons with known noise, of {len(tested)} selections {pays} pay at equal samples, {loses} lose; "
        f"the best is {best.selection}, {_signed(best.mean)} points on the raw pool's {interval(list(raw.values()))} % "
        f"({len(raw)} seeds; corrected for the number of selections)."
    )


def _cost_of_a_filter(tested: list[Gain], twice: Gain | None) -> str:
    """Return whether the best selection gains more than the samples that its filter was trained with would."""
    if twice is None:
        return ""
    best = tested[0]
    changes = [best.of_seed[seed] - value for seed, value in twice.of_seed.items() if seed in best.of_seed]
    chance = 1.0 if len(changes) < 2 or not np.ptp(changes) else float(ttest_1samp(changes, 0).pvalue)
    pays = "pays" if np.mean(changes) > 0 else "does not pay"
    verdict = f"a filter of one's own {pays}" if chance < LEVEL else "whether a filter of one's own pays is open"
    return (
        f" Twice the samples of the raw pool, the cost of a filter and a model together, are worth "
        f"{_signed(twice.mean)}; {best.selection} against that: {interval(changes)} over the seeds. So for a single "
        f"model {verdict}; one that is there already, or that serves several models, costs nothing more."
    )


def is_mixture(name: str) -> bool:
    """Return whether a row is a mixture of data experts."""
    return name.startswith("MoDE")


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


# ---------------------------------------------------------------- tables


def tables(lines: Lines) -> str:
    """Return accuracy by selection, best first, and what is left of each kind of noise."""
    return f"{verdict(lines)}\n\n{gains_table(lines)}\n\n{kinds_table(lines)}"


def gains_table(lines: Lines) -> str:
    """Return the average of each selection and what it gains on the raw pool, the best first."""
    scores, of, gain_of = averages(lines), _last(lines), {gain.selection: gain for gain in gains(lines)}
    rows = []
    for name in _by_score(scores):
        gain = gain_of.get(name)
        change = "" if gain is None else _signed(gain.mean) + (f"\u00a0±\u00a0{gain.half:.1f}" if gain.half else "")
        chance = "" if gain is None or gain.corrected is None else _chance(gain.corrected)
        passes = f"{of[name]['samples'] / of[name]['pairs']:.1f}"
        pairs = f"{of[name]['pairs']:,}"
        rows.append([name, pairs, passes, interval(list(scores[name].values())), change, chance])
    return table(["selection", "pairs", "passes over them", "accuracy", "against raw", "p (Holm)"], rows)


def kinds_table(lines: Lines) -> str:
    """Return the share of each kind of noise that each selection keeps, in percent."""
    of = {name: line for name, line in _last(lines).items() if "of" not in line}
    names, kinds = [name for name in _by_score(averages(lines)) if name in of], kinds_of(lines)
    rows = [[name, *(f"{100 * of[name]['kept'].get(kind, 0.0):.0f}" for kind in kinds)] for name in names]
    return table(["% kept", *kinds], rows)


def mixtures_table(lines: Lines) -> str:
    """Return data experts beside the dense model that has seen as many samples of the same pairs."""
    scores, rows = averages(lines), []
    for name, line in _last(lines).items():
        if line.get("of") and is_mixture(name):
            own, dense = scores[name], scores[line["of"]]
            changes = [own[seed] - dense[seed] for seed in own if seed in dense]
            sides = [interval(list(side.values())) for side in (dense, own)]
            rows.append([name, f"{line['samples']:,}", *sides, interval(changes)])
    return table(["mixture", "samples", "dense", "mixture's accuracy", "difference"], rows)


def facts(lines: Lines) -> str:
    """Return what the models were trained on, where and when."""
    if not lines:
        return "Not measured yet."
    raw, seeds = _last(lines).get(RAW, lines[-1]), len({line["seed"] for line in lines})
    machines = ", ".join(sorted({line["machine"]["machine"] for line in lines}))
    dates = ", ".join(sorted({line["date"] for line in lines}))
    return (
        f"{raw['pairs']:,} pairs, {raw['samples']:,} samples for a model, tasks {', '.join(raw['tasks'])}; "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}; {machines}, {dates}."
    )


def kinds_of(lines: Lines) -> list[str]:
    """Return the kinds of pairs, clean ones first."""
    return sorted({kind for line in lines for kind in line["kept"]}, key=lambda kind: (kind != CLEAN, kind))


def _last(lines: Lines) -> dict[str, Mapping[str, Any]]:
    return {line["selection"]: line for line in lines}


def _by_score(scores: Mapping[str, Mapping[int, float]]) -> list[str]:
    return sorted(scores, key=lambda name: -float(np.mean(list(scores[name].values()))))


def _chance(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


# ---------------------------------------------------------------- the page


def write_study(path: Path, lines: Lines, costs: Lines, selections: Mapping[str, Any]) -> Path:
    """Write what was measured as a page, and return its path.

    Args:
        path: The page.
        lines: What models reached.
        costs: What curations took.
        selections: Those of the plan, for the methods that each has.
    """
    scores, of = averages(lines), _last(lines)
    gain_of = {gain.selection: gain for gain in gains(lines)}
    seconds_of = {line["selection"]: line["processor_seconds"] for line in costs}
    rows = []
    for name in _by_score(scores):
        line = of[name]
        rows.append(
            {
                "name": name,
                "tone": _tone(name, selections),
                "line": line,
                "scores": scores[name],
                "mean": float(np.mean(list(scores[name].values()))),
                "gain": gain_of.get(name),
                "tasks": {
                    task: float(np.mean([one["tasks"][task] for one in lines if one["selection"] == name]))
                    for task in line["tasks"]
                },
                "seconds": seconds_of.get(name),
                "trains_filter": _trains_filter(selections.get(line.get("of", name))),
            }
        )
    machines = sorted({line["machine"]["machine"] for line in lines})
    return write_page(
        path,
        Path(__file__).parent / "curation_report.html",
        verdict=verdict(lines),
        rows=rows,
        chart=draw_gains(rows),
        families=[(f"e{place}", name) for place, name in enumerate(FAMILIES)] + [("m-mixture", "mixture")],
        kinds=kinds_of(lines),
        tasks=list(lines[0]["tasks"]) if lines else [],
        num_seeds=len(scores.get(RAW, {})),
        num_pairs=max((line["pairs"] for line in lines), default=0),
        samples=of[RAW]["samples"] if RAW in of else 0,
        machines=machines,
        dates=sorted({line["date"] for line in lines}),
        cost_machines=sorted({f"{line['machine']}, {line['date']}" for line in costs}),
        num_experts=len(FAMILIES),
    )


def _tone(name: str, selections: Mapping[str, Any]) -> str:
    """Return the class of ``page.css`` that colours a selection."""
    if is_mixture(name):
        return "m-mixture"
    if name in (RAW, ORACLE) or name.startswith(f"{RAW},"):
        return f"m-{ORACLE}"
    methods = [step["method"] for step in selections.get(name, ())] or ["klite"]
    return f"e{FAMILIES.index(methods[0] if len(methods) == 1 else 'several')}"


def _trains_filter(steps: Any) -> bool:
    return isinstance(steps, list) and any("clean" in step for step in steps)


def draw_gains(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Place a row for each selection, with its seeds, its mean and its interval, on an axis of gains."""
    shown = [row for row in rows if row["gain"] is not None]
    ends = [0.0]
    for row in shown:
        gain = row["gain"]
        ends += [*gain.of_seed.values(), gain.mean - (gain.half or 0), gain.mean + (gain.half or 0)]
    margin = 0.03 * (max(ends) - min(ends) or 1.0)
    height = ROW_HEIGHT * len(shown) + 40
    axis = Axis(min(ends) - margin, max(ends) + margin, NAMES_WIDTH, WIDTH - NUMBERS_WIDTH)
    dots = []
    for place, row in enumerate(shown):
        gain = row["gain"]
        half = gain.half
        dots.append(
            {
                "name": row["name"],
                "tone": row["tone"],
                "y": ROW_HEIGHT * (place + 0.5) + 6,
                "x": axis.place(gain.mean),
                "seeds": [axis.place(value) for value in gain.of_seed.values()],
                "reach": None if half is None else (axis.place(gain.mean - half), axis.place(gain.mean + half)),
                "words": _signed(gain.mean) + (f" ± {half:.1f}" if half else ""),
                "verdict": gain.verdict,
                "mark": {"pays": "pays", "loses": "loses"}.get(gain.verdict, ""),
                "chance": None if gain.corrected is None else _chance(gain.corrected),
            }
        )
    return {
        "size": (WIDTH, height),
        "frame": (axis.start, 4.0, axis.end, height - 30),
        "x_ticks": axis.ticks(8),
        "y_ticks": [],
        "zero": axis.place(0.0),
        "rows": dots,
    }
