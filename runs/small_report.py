"""What was tried on the smallest towers: controls, routers, experts that train a part of them, learning rates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from experiments import HERE, PARTS, QUARTER, Arm, Study, base_arm, training_flops
from findings import IMAGE_ARM, Gain, at_equal_cost
from records import BY_SEED, Records, against, averages, mean, short, table

WITH_RATES: Mapping[str, Arm] = {QUARTER: IMAGE_ARM, "names": base_arm(encoder="clip-image", part=20)}
"""Studies that were trained with other learning rates too, and the experts there."""


def controls_table(records: Records) -> str:
    """Experts of images against what has no such clusters, all at equal cost."""
    arms = {
        "MoDE-4 of images": IMAGE_ARM,
        "four groups of whole icon sets (routed as images are)": base_arm(encoder="clip-sets"),
        "MoDE-4 of captions": base_arm(),
        "Full-4 (uniform)": base_arm(kind="full"),
        "Random-4 (uniform)": base_arm(kind="random"),
    }
    dense = records.equal(QUARTER, PARTS)
    rows = [["dense", mean(dense), "", "", "", ""]] if dense else []
    for name, arm in arms.items():
        cells = []
        for how in ("", "log"):
            scores, images = records.mixed(QUARTER, arm, how), records.mixed(QUARTER, IMAGE_ARM, how)
            cells += [against(scores, dense), against(images, scores) if arm != IMAGE_ARM else ""]
        if scores := records.mixed(QUARTER, arm):
            rows.append([name, mean(scores), *cells])
    columns = ["at equal cost", "average", "against dense", "images against it"]
    return table([*columns, "by log-probabilities, against dense", "images against it"], rows)


def parts_table(records: Records) -> str:
    """Experts that part late and train all of the towers or a part, at the same floating-point operations."""
    study, dense = records.studies[QUARTER], records.equal(QUARTER, PARTS)
    rows = []
    for arm in study.arms:
        parts_late = study.embeds_at < arm.part < PARTS
        if arm.kind == "mode" and parts_late and (scores := records.mixed(QUARTER, arm)):
            share = training_flops(study.train.model, arm.trainable) / training_flops(study.train.model)
            cells = [str(arm.part), f"{100 * share:.0f}", thousands(study, arm), mean(scores), against(scores, dense)]
            rows.append([of(arm), trains(arm), *cells, against(records.mixed(QUARTER, arm, "log"), dense)])
    columns = ["four experts of", "train", "parted at", "a sample's FLOPs, %", "thousand samples each", "average"]
    return table([*columns, "against dense", "by log-probabilities, against dense"], rows, words=2)


def last_blocks() -> str:
    """Return what experts gain that train the last block of towers of two, by the pilot's record."""
    pilot = json.loads((HERE / "pilot.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row["gain"] for row in pilot["rows"]}

    def said(name: str) -> str:
        parts = []
        for question, words in (("class names", "class names"), ("retrieval", "retrieval")):
            mean, low, high = (100 * rows[name][question][key] for key in ("mean", "low", "high"))
            parts.append(f"{mean:+.1f} ({low:+.1f} to {high:+.1f}) points of {words}")
        return " and ".join(parts)

    plan = pilot["plan"]
    where = f"`{plan['model']}`, {plan['num_pairs']:,} pairs, {plan['samples']:,} samples, {plan['seeds']} seeds"
    return (
        f"`last:1` on towers of two blocks ({where}, parted half way, `runs/pilot.json`): experts of images stand at "
        f"{said('trunk')} against the dense model of equal cost, whole ones of the same clusters at {said('images')}."
    )


def finished_table(records: Records) -> str:
    """What a finished model gains when it goes on, as it is, as copies or as experts, at the same operations."""
    study = records.studies[QUARTER]
    arms = [arm for arm in study.arms if arm.extra]
    alone = next(arm for arm in arms if arm.experts == 1)
    finished, one = records.equal(QUARTER, PARTS), records.mixed(QUARTER, alone)
    rows = [["the finished model", "", "", mean(finished), "", "", ""]] if one else []
    for arm in arms:
        if scores := records.mixed(QUARTER, arm):
            copies = "four models on all pairs (uniform)"
            name = (
                "one model on all pairs" if arm == alone else copies if arm.kind == "full" else f"experts of {of(arm)}"
            )
            cells = [thousands(study, arm), mean(scores), against(scores, finished)]
            pairs = ((scores, one), (records.mixed(QUARTER, arm, "log"), one))
            rows.append([name, trains(arm), *cells, *("" if arm == alone else against(*pair) for pair in pairs)])
    columns = ["what goes on", "trains", "thousand samples each", "average", "against the finished model"]
    return table([*columns, "against one model that goes on", "by log-probabilities, against it"], rows, words=2)


def finished_found(records: Records) -> str:
    """Return what gains when a finished model goes on."""
    gains = {}
    for arm in records.studies[QUARTER].arms:
        if arm.extra and arm.experts > 1:
            name = "four copies" if arm.kind == "full" else f"experts of {of(arm)}"
            for how, words in {"": "", "log": ", log-probabilities"}.items():
                what = f"{name}{'' if arm.trainable == 'all' else f' that train {trains(arm)}'}{words}"
                gains[what] = at_equal_cost(records, QUARTER, arm, how)
    return sorted_out(gains, "one model that goes on")


def batches_found(records: Records) -> str:
    """Return which batches of one cluster change a dense model, against random batches of their size."""
    gains = {}
    for arm in records.studies[QUARTER].arms:
        if arm.kind == "pure":
            size = f" of {arm.batch}" if arm.batch else ""
            what = f"batches{size} of one of {arm.experts} clusters of {of(arm)} from part {arm.part} on"
            same = records.equal(QUARTER, PARTS)
            if arm.batch:
                same = records.tasks(QUARTER, f"batch-p{arm.part}-b{arm.batch}")
            gains[what] = Gain.of(records.tasks(QUARTER, arm.name), same)
    return sorted_out(gains, "random batches of their size")


def sorted_out(gains: Mapping[str, Gain], opponent: str) -> str:
    """Return which of several gains are certain, over at least two seeds."""
    measured = {what: gain for what, gain in gains.items() if len(gain.values) > 1}
    if not measured:
        return "Not measured yet."
    seeds = sorted({len(gain.values) for gain in measured.values()})
    sure = [what for what, gain in measured.items() if gain.is_certain]
    parts = []
    for words, sign in (("Better", 1), ("Worse", -1)):
        chosen = [f"{what} ({measured[what]})" for what in sure if sign * measured[what].mean > 0]
        if chosen:
            parts.append(f"{words} than {opponent} for certain: {'; '.join(chosen)}.")
    open_ones = [gain.mean for what, gain in measured.items() if what not in sure]
    if open_ones:
        rest = "all" if not sure else "the other"
        spread = f"{min(open_ones):+.1f} to {max(open_ones):+.1f}" if len(open_ones) > 1 else f"{open_ones[0]:+.1f}"
        parts.append(f"Of {rest} {len(open_ones)} nothing is certain ({spread} points, {_count(seeds)} seeds).")
    return " ".join(parts)


def _count(seeds: Sequence[int]) -> str:
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"


def of(arm: Arm) -> str:
    """Return what an arm's clusters are made of."""
    return "images" if arm.encoder == "clip-image" else "captions"


def trains(arm: Arm) -> str:
    """Return what an arm trains."""
    return "everything" if arm.trainable == "all" else f"`{arm.trainable}`"


def thousands(study: Study, arm: Arm) -> str:
    """Return how many thousand samples each model of an arm sees after the parting."""
    share = training_flops(study.train.model, arm.trainable) / training_flops(study.train.model)
    parts = arm.extra or PARTS - arm.part
    return f"{parts / PARTS * study.train.samples / arm.experts / share / 1000:.0f}"


def routers_table(records: Records) -> str:
    """Experts of images routed by the seed model's tower, or by a router that costs none."""
    dense = records.equal(QUARTER, PARTS)
    row, count = f"{IMAGE_ARM.name} routers", IMAGE_ARM.experts
    whole = records.tasks(QUARTER, row, f"tower, {count}")
    rows = []
    for way, towers in (("tower", 1), ("patches", 0)):
        for kept in range(count, 0, -1):
            if scores := records.tasks(QUARTER, row, f"{way}, {kept}"):
                words = {"tower": "the seed model's tower", "patches": "its patch embedding, distilled"}[way]
                cells = [str(kept), str(kept + towers), mean(scores), against(scores, dense)]
                rows.append([words, *cells, against(scores, whole) if kept < count or way != "tower" else ""])
    columns = ["weights by", "experts an image", "image towers", "average", "against dense"]
    return table([*columns, f"against the tower with {count}"], rows)


def rates_table(records: Records) -> str:
    """Dense models and experts of images by learning rate, on the tasks that choose and on the others."""
    rows = []
    for study, arm in WITH_RATES.items():
        kinds = by_rate(records, study, arm)
        for kind, rates in kinds.items() if any(len(rates) > 1 for rates in kinds.values()) else ():
            for rate, scores in rates.items():
                cells = [mean(scores, records.tuned), mean(scores, ~records.tuned), mean(scores)]
                rows.append([short(records.studies[study]), kind, rate, *cells])
    columns = ["towers", "models", "learning rate", "tasks that choose", "other tasks", "all tasks"]
    return table(columns, rows, words=3)


def by_rate(records: Records, name: str, images: Arm) -> dict[str, dict[str, BY_SEED]]:
    """Return what each kind of model of a study reaches with each rate, the lowest first, by seed."""
    study = records.studies[name]
    base = study.train.learning_rate
    kinds: dict[str, dict[str, BY_SEED]] = {
        "dense": {f"{base:g}": records.equal(name, PARTS)},
        "MoDE-4 of images": {f"{base:g}": records.mixed(name, images)},
    }
    for other_name, other in records.other_rates.items():
        if other_name.startswith(f"{name}-r"):
            rate = f"{other.train.learning_rate:g}"
            kinds["dense"][rate] = records.equal(other_name, PARTS)
            kinds["MoDE-4 of images"][rate] = records.mixed(other_name, images)
    for arm in study.arms:
        if arm.rate != 1:
            kinds["MoDE-4 of images"][f"{base * arm.rate:g} from the parting on"] = records.mixed(name, arm)
    return {
        kind: {rate: rates[rate] for rate in sorted(rates, key=lambda rate: float(rate.split()[0])) if rates[rate]}
        for kind, rates in kinds.items()
    }


@dataclass(frozen=True)
class Tuned:
    """What experts of images gain on a dense model, each with the learning rate that is best for it."""

    rates: tuple[str, str]
    """The rate of the dense model and that of the experts, which every fourth task chooses."""
    tried: tuple[list[str], list[str]]
    """The rates that each was trained with in all seeds, the lowest first."""
    after: Gain
    """On the other tasks."""
    before: Gain
    """The same with the usual rate for both."""

    @classmethod
    def of(cls, records: Records, study: str) -> Tuned | None:
        """Choose the rates of a study; None where it was trained with one rate only."""
        dense, images = (_with_all_seeds(rates) for rates in by_rate(records, study, WITH_RATES[study]).values())
        if min(len(dense), len(images)) < 2:
            return None

        def best(rates: dict[str, BY_SEED]) -> str:
            return max(rates, key=lambda rate: float(np.mean(list(averages(rates[rate], records.tuned).values()))))

        usual = f"{records.studies[study].train.learning_rate:g}"
        chosen = (best(dense), best(images))
        after, before = (
            Gain.of(images[mine], dense[theirs], ~records.tuned) for theirs, mine in (chosen, (usual, usual))
        )
        return cls(rates=chosen, tried=(list(dense), list(images)), after=after, before=before)

    def __str__(self) -> str:
        """Return it in two sentences."""
        said = []
        for rate, rates in zip(self.rates, self.tried, strict=True):
            is_largest = float(rate.split()[0]) == float(rates[-1].split()[0])
            said.append(f"{rate}{' (the largest)' if is_largest else ''} of {len(rates)}")
        seeds = len(self.after.values)
        return (
            f"every fourth task chooses {said[0]} for the dense model and {said[1]} for experts of images. On the "
            f"other tasks the experts then stand at {self.after} against the dense model; with the usual rate for both "
            f"they stand at {self.before} there ({seeds} random seed{'s' if seeds > 1 else ''})."
        )


def rates_found(records: Records) -> str:
    """Return whether the verdict is another one with the rates that are best for each kind, a line for each size."""
    found = {short(records.studies[study]): Tuned.of(records, study) for study in WITH_RATES}
    return "\n".join(f"- `{size}`: {one}" for size, one in found.items() if one) or "Not measured yet."


def tuned(records: Records) -> str:
    """Return what README says of rates in brackets behind the gain of experts of images on a quarter of the pairs."""
    found = Tuned.of(records, QUARTER)
    return f" ({found.after} with a learning rate chosen for each)" if found else ""


def _with_all_seeds(rates: dict[str, BY_SEED]) -> dict[str, BY_SEED]:
    """Return the rates that have as many seeds as any: one that a first seed shows to be far off gets no others."""
    most = max((len(scores) for scores in rates.values()), default=0)
    return {rate: scores for rate, scores in rates.items() if len(scores) == most}
