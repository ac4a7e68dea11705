"""What the paper claims, how each claim was tested here, and whether it holds: a table from records.

`runs/results.py` writes it into docs/results.md. The records are those of `runs/measure.py` and `runs/claims.py`.

A claim is a difference that is above 0 if it is true. It *holds* if the 95 % t-interval of that difference over the
random seeds lies above 0, it *does not hold* if it lies below, and it is *not certain* where the interval has 0 in it
or there is one seed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import subjects_report
from experiments import PARTS, Arm, base_arm, training_flops
from findings import Gain, holm
from records import BY_SEED, Records, averages, interval, short, table
from scipy.stats import spearmanr

SUBJECTS = Path(__file__).parent / "subjects.jsonl"
PLAIN = "as drawn"
CAPTIONS, IMAGES = base_arm(), base_arm(encoder="clip-image")
PAPER = base_arm(budget="paper")
WAYS = {"cosines": "tasks", "log-probabilities": "logs"}


class Measured:
    """The records of `runs/claims.py`, by row and seed."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def values(self, row: str, name: str) -> BY_SEED:
        """Return numbers of a row by seed, those of a single model as an array of one."""
        found = {line["seed"]: line["values"] for line in self.lines if line["row"] == row}
        return {seed: np.atleast_1d(np.array(of[name])) for seed, of in sorted(found.items()) if name in of}

    @property
    def shifts(self) -> list[str]:
        """The ways in which pictures are changed, as far as all seeds were asked."""
        rows = [line["row"].removesuffix(": dense") for line in self.lines if line["row"].endswith(": dense")]
        changes = dict.fromkeys(row for row in rows if row not in {PLAIN, "labelled", "trained on"})
        seeds = self.values(f"{PLAIN}: dense", "tasks").keys()
        return [change for change in changes if self.values(f"{change}: dense", "tasks").keys() == seeds]

    def gain(self, row: str, name: str, other: str, other_name: str) -> Gain:
        """Return how two rows differ."""
        return Gain.of(self.values(row, name), self.values(other, other_name))

    def shifted(self, arm: Arm, way: str) -> Gain:
        """Return what a mixture gains on the dense model on changed pictures, in the mean over the changes."""
        gains = [self.gain(f"{shift}: {arm.name}", WAYS[way], f"{shift}: dense", "tasks") for shift in self.shifts]
        sizes = {len(gain.values) for gain in gains}
        return Gain(np.mean([gain.values for gain in gains], axis=0).tolist() if len(sizes) == 1 else [])

    def experts(self, name: str) -> dict[int, np.ndarray]:
        """Return what each single expert reaches as a classifier, by seed; only seeds with all of them."""
        found = [self.values(f"labelled: {CAPTIONS.name}-{k}", name) for k in range(CAPTIONS.experts)]
        seeds = set.intersection(*(set(of) for of in found))
        return {seed: np.concatenate([of[seed] for of in found]) for seed in sorted(seeds)}

    def best(self, name: str) -> BY_SEED:
        """Return the best expert's accuracy, by the labels."""
        return {seed: values.max(keepdims=True) for seed, values in self.experts(name).items()}

    def agreement(self, other: str) -> Gain:
        """Return the rank correlation of the experts' zero-shot accuracy with what they reach otherwise."""
        first, second = self.experts("zero-shot"), self.experts(other)
        return Gain([float(spearmanr(first[seed], second[seed]).statistic) for seed in first])


@dataclass(frozen=True)
class Claim:
    """What the paper says, and the difference that is above 0 if it is so."""

    words: str
    source: str
    tested: str
    gain: Gain | None = None

    @property
    def verdict(self) -> str:
        """Whether it holds here."""
        if self.gain is None or not self.gain.values:
            return "not tested"
        if not self.gain.is_certain:
            return "not certain"
        return "holds" if self.gain.mean > 0 else "does not hold"


def claims(records: Records, measured: Measured) -> list[Claim]:
    """Return every claim of the paper, in its order."""
    parts: Sequence[Callable[[Records, Measured], Iterator[Claim]]] = (
        _mixtures,
        _robustness,
        _retrieval,
        _clustering,
        _encoders,
        _encoders_of_images,
        _order,
        _mechanism,
    )
    return [claim for part in parts for claim in part(records, measured)]


def _mixtures(records: Records, _: Measured) -> Iterator[Claim]:
    dense, words = records.tasks("main", "part-32"), "Experts of clusters of captions beat the dense model"
    late = base_arm(part=27, budget="paper")
    own = "against dense on its own schedule"
    yield Claim(
        words,
        "Tables 1, 2",
        f"as published: MoDE-4 parted at 27, `paper` rule, {own}",
        Gain.of(records.tasks("main", f"{late.name} paper"), dense),
    )
    yield Claim(
        words,
        "Tables 1, 2",
        f"MoDE-4 parted at 16, `paper` rule, {own}",
        Gain.of(records.tasks("main", f"{PAPER.name} paper"), dense),
    )
    yield Claim(
        words,
        "Tables 1, 2",
        f"MoDE-4 parted at 16, `per_class`, {own}",
        Gain.of(records.mixed("main", PAPER), dense),
    )
    yield Claim(
        words,
        "not compared there",
        "the same against dense of equal cost",
        Gain.of(records.mixed("main", PAPER), records.equal("main", PAPER.cost)),
    )
    for study in ("main", "long-xxxs", "xs"):
        for how, name in (("", "cosines"), ("log", "log-probabilities")):
            yield Claim(
                words,
                "not compared there",
                f"`matched` MoDE-4, `{short(records.studies[study])}`, {name}, against dense of equal cost",
                Gain.of(records.mixed(study, CAPTIONS, how), records.equal(study, PARTS)),
            )
    asked = subjects_report.read(SUBJECTS)
    for grouping, tasks in (("wordnet", "subjects of WordNet"), ("categories", "categories of icons")):
        row = f"{CAPTIONS.name} mixing", subjects_report.LOG
        yield Claim(
            words,
            "Sec. 4 (its tasks are subjects)",
            f"`matched` MoDE-4, `xxs`, log-probabilities, on {tasks}, against dense of equal cost",
            Gain(subjects_report.gains(asked, grouping, *row).mean(axis=1).tolist()),
        )
    more = "More experts are better"
    for count in (4, 8):
        many, few = (base_arm(experts=k, budget="paper") for k in (count, count // 2))
        yield Claim(
            more,
            "Fig. 3, Table 11",
            f"MoDE-{count} against MoDE-{count // 2}, each expert trained as long (`paper`)",
            Gain.of(records.mixed("main", many), records.mixed("main", few)),
        )
    yield Claim(
        more,
        "not compared there",
        "MoDE-8 against MoDE-4 at equal cost (`matched`)",
        Gain.of(records.mixed("main", base_arm(experts=8)), records.mixed("main", CAPTIONS)),
    )

    def gains(study: str) -> dict[int, float]:
        mine, dense = averages(records.mixed(study, PAPER)), averages(records.tasks(study, "part-32"))
        return {seed: mine[seed] - dense[seed] for seed in mine if seed in dense}

    many, few = gains("main"), gains("few")
    yield Claim(
        "They gain more where there are more data",
        "Table 2 against 1",
        "gain of MoDE-4 (`paper`) on dense with all pairs against that with a tenth of them",
        Gain([many[seed] - few[seed] for seed in many if seed in few]),
    )
    small, large = records.studies["main"].train, records.studies["xs"].train
    share = small.samples * training_flops(small.model) / (large.samples * training_flops(large.model))
    for arm, of in ((CAPTIONS, "captions"), (IMAGES, "images")):
        yield Claim(
            "Four experts of small towers beat larger dense towers for less than 35 % of their cost",
            "abstract, Fig. 4",
            f"MoDE-4 of {of}, `xxs`, against dense `xs`, at {100 * share:.0f} % of its FLOPs on the same pairs",
            Gain.of(records.mixed("main", arm), records.equal("xs", PARTS)),
        )


def _robustness(_: Records, measured: Measured) -> Iterator[Claim]:
    for arm, of in ((CAPTIONS, "captions"), (IMAGES, "images")):
        for way in WAYS:
            yield Claim(
                "Experts gain on shifted pictures",
                "Table 3",
                f"MoDE-4 of {of}, {way}, against dense of equal cost, mean over {len(measured.shifts)} changes (below)",
                measured.shifted(arm, way),
            )


def _retrieval(records: Records, _: Measured) -> Iterator[Claim]:
    def recall(model: str, side: str) -> BY_SEED:
        found = records.values("main", f"{PAPER.name} retrieval")
        return {s: np.array([v[model][f"{side}_retrieval_recall@1"]]) for s, v in found.items() if model in v}

    for side in ("text", "image"):
        for rule in ("paper", "per_class"):
            yield Claim(
                "Experts retrieve better",
                "Tables 4, 12",
                f"{side} R@1, MoDE-4 (`paper`), `{rule}`, against dense on its own schedule",
                Gain.of(recall(rule, side), recall("dense", side)),
            )
        yield Claim(
            "Experts retrieve better",
            "not compared there",
            f"{side} R@1, MoDE-4 (`paper`), `per_class`, against dense of equal cost",
            Gain.of(recall("per_class", side), recall("dense-total", side)),
        )


def _clustering(records: Records, _: Measured) -> Iterator[Claim]:
    mode, dense = records.mixed("main", CAPTIONS), records.tasks("main", "part-32")
    for kind, words in (
        ("full", "Experts beat as many models of all data (Full-n)"),
        ("random", "Experts beat experts of a random split (Random-n)"),
    ):
        control = base_arm(kind=kind)
        for how, name in (("", "cosines"), ("log", "log-probabilities")):
            yield Claim(
                words,
                "Table 5",
                f"MoDE-4 against {kind.capitalize()}-4 at equal cost, {name}",
                Gain.of(records.mixed("main", CAPTIONS, how), records.mixed("main", control, how)),
            )
        yield Claim(
            f"{kind.capitalize()}-n is no better than the dense model",
            "Table 5",
            f"dense against {kind.capitalize()}-4 at equal cost",
            Gain.of(dense, records.mixed("main", control)),
        )
    one_step, coarse = base_arm(fine=4), f"{CAPTIONS.name} coarse"
    yield Claim(
        "Two steps of clustering beat one",
        "Table 6",
        "MoDE-4 against OneStep-4 (M = K)",
        Gain.of(mode, records.mixed("main", one_step)),
    )
    yield Claim(
        "Fine centres route better than coarse ones",
        "Table 6",
        "`paper` rule against CoarseCluster-4",
        Gain.of(records.tasks("main", f"{CAPTIONS.name} paper"), records.tasks("main", coarse)),
    )
    for low, high in ((32, 1024), (1024, 2048)):
        yield Claim(
            "More fine clusters are better",
            "Fig. 5",
            f"M = {high:,} against {low:,}",
            Gain.of(records.mixed("main", base_arm(fine=high)), records.mixed("main", base_arm(fine=low))),
        )
    for arm, budget in ((PAPER, "paper"), (CAPTIONS, "matched")):
        even = records.tasks("main", f"{arm.name} uniform")
        yield Claim(
            "Weights by the task beat a plain average",
            "Sec. 3.4",
            f"`paper` rule against `uniform`, MoDE-4 `{budget}`",
            Gain.of(records.tasks("main", f"{arm.name} paper"), even),
        )
        yield Claim(
            "Weights by the task beat a plain average",
            "ours",
            f"`per_class` against `uniform`, MoDE-4 `{budget}`, tasks that did not choose it",
            Gain.of(records.mixed("main", arm), even, records.confirmed),
        )


def _encoders(records: Records, _: Measured) -> Iterator[Claim]:
    def against(encoder: str) -> Gain:
        return Gain.of(records.mixed("main", CAPTIONS), records.mixed("main", base_arm(encoder=encoder)))

    yield Claim(
        "Clusters of captions beat clusters of images",
        "Table 7",
        "MoDE-4, MiniLM, against the seed's images",
        against("clip-image"),
    )
    yield Claim(
        "Clusters of captions beat clusters of both",
        "Table 7",
        "MoDE-4, MiniLM, against the seed's images and captions",
        against("clip-both"),
    )
    for study in ("main", "long-xxxs"):
        yield Claim(
            "Clusters of images do not beat the dense model",
            "Table 7, Sec. 5.3",
            f"dense against MoDE-4 of images at equal cost, `{short(records.studies[study])}`",
            Gain.of(records.equal(study, PARTS), records.mixed(study, IMAGES)),
        )
    yield Claim(
        "A language model's vectors beat the seed's of captions",
        "Table 7",
        "MiniLM (in the place of SimCSE) against the seed's text tower",
        against("clip"),
    )
    yield Claim(
        "A language model's vectors beat TF-IDF", "Fig. 6 (examples)", "MiniLM against TF-IDF", against("tfidf")
    )
    yield Claim(
        "SimCSE is as good supervised as unsupervised",
        "Table 16",
        "no: its weights lie on a model hub, which a closed machine does not reach; MiniLM stands in above",
    )


def _encoders_of_images(records: Records, measured: Measured) -> Iterator[Claim]:
    def probe(arm: Arm, model: str) -> BY_SEED:
        found = records.values("main", f"{arm.name} probe")
        return {seed: np.array([values[model]]) for seed, values in found.items() if model in values}

    words = "A linear probe on all experts' features beats that of the dense model"
    paper, matched = probe(PAPER, "MoDE-4"), probe(CAPTIONS, "MoDE-4")
    yield Claim(words, "Table 9", "MoDE-4 (`paper`), own schedule", Gain.of(paper, probe(PAPER, "dense")))
    yield Claim(
        words,
        "not compared there",
        "MoDE-4 (`paper`), dense of equal cost",
        Gain.of(paper, probe(PAPER, "dense-total")),
    )
    yield Claim(
        words,
        "not compared there",
        "MoDE-4 (`matched`), dense of equal cost",
        Gain.of(matched, probe(CAPTIONS, "dense")),
    )
    yield Claim(
        "Concatenation beats the sum",
        "App. D",
        "linear probe, MoDE-4 (`paper`)",
        Gain.of(paper, probe(PAPER, "MoDE-4, sum")),
    )
    row, dense = f"labelled: {CAPTIONS.name}", "labelled: dense"
    yield Claim(
        words,
        "not compared there",
        "MoDE-4 (`matched`), dense of equal cost, other trainings (below), one regularisation for both",
        measured.gain(row, "probe", dense, "probe"),
    )
    for name, words in (("probe", "A single expert's linear probe"), ("tuned", "A single expert, fine-tuned,")):
        yield Claim(
            f"{words} can beat the dense model's",
            "Table 10",
            "best of four experts (by the labels), `matched`: each has trained a quarter as long after the parting",
            Gain.of(measured.best(name), measured.values(dense, name)),
        )
    yield Claim(
        "The probe on all experts beats fine-tuning one",
        "Table 10",
        "concatenated probe against the best expert fine-tuned",
        Gain.of(measured.values(row, "probe"), measured.best("tuned")),
    )
    for name, shown in (("probe", "linear probe"), ("tuned", "fine-tuning")):
        yield Claim(
            f"The better an expert's zero-shot, the better its {shown}",
            "Table 10",
            "rank correlation over four experts",
            measured.agreement(name),
        )
    average, words = f"mean of {CAPTIONS.name}", "The mean of the experts' weights is a better start for fine-tuning"
    yield Claim(
        words,
        "Table 18",
        "tuned on 2,000 labelled icons, against dense",
        measured.gain(f"labelled: {average}", "tuned", dense, "tuned"),
    )
    for arm, of in ((CAPTIONS, "captions"), (IMAGES, "images")):
        yield Claim(
            words,
            "Table 18",
            f"experts of {of}, trained on for {_samples(measured)} samples of all pairs, against dense alike",
            measured.gain(f"trained on: mean of {arm.name}", "tasks", "trained on: dense", "tasks"),
        )
    yield Claim(
        "The mean of the experts' weights is a good model as it is",
        "not compared there",
        "the mean without more training, against dense of equal cost",
        Gain.of(records.tasks("main", f"{CAPTIONS.name} averaged"), records.tasks("main", "part-32")),
    )


def _samples(measured: Measured) -> str:
    found = [line["values"]["samples"] for line in measured.lines if line["row"] == "trained on: dense"]
    return f"{found[0]:,}" if found else "a few"


def _order(records: Records, _: Measured) -> Iterator[Claim]:
    eight = base_arm(experts=8).name
    first = {count: records.tasks("main", f"{eight} first {count}") for count in (0, 4, 8)}
    yield Claim(
        "Experts that are added later go on improving it",
        "Fig. 7",
        "the first four of eight against the seed model",
        Gain.of(first[4], first[0]),
    )
    yield Claim(
        "Experts that are added later go on improving it",
        "Fig. 7",
        "all eight against the first four",
        Gain.of(first[8], first[4]),
    )
    names = records.data["tasks"]
    for arm in records.studies["main"].arms:
        if arm.kind == "prior" and (scores := records.tasks("main", arm.name)):
            chosen = np.array([arm.task in {name, "all"} for name in names])
            every = arm.task == "all"
            yield Claim(
                "One expert for names that are known beforehand beats the dense model",
                "Table 17" if every else "Table 8",
                f"names of {'all tasks' if every else f'`{arm.task}`'}, at equal cost",
                Gain.of(scores, records.equal("main", PARTS), chosen),
            )
    for subject, (gains, _) in subjects_report.known(subjects_report.read(SUBJECTS)).items():
        yield Claim(
            "One expert for names that are known beforehand beats the dense model",
            "Table 8",
            f"names of the subject {subject} (WordNet), at equal cost",
            Gain(gains.tolist()),
        )


def _mechanism(records: Records, _: Measured) -> Iterator[Claim]:
    found = records.values("main", f"{CAPTIONS.name} negatives")

    def differ(name: str) -> list[float]:
        return [100 * (value["expert"][name] - value["random"][name]) for value in found.values()]

    yield Claim(
        "A batch of one cluster has harder negatives",
        "Sec. 3.1, 5.4",
        "mean cosine of other captions, times 100, in an expert's batch against a batch of all pairs",
        Gain(differ("cosine")),
    )
    yield Claim(
        "Experts meet fewer false negatives",
        "abstract",
        "pairs per 100 that meet their own caption or one of cosine 0.9, fewer in an expert's batch",
        Gain([-value for value in differ("false")]),
    )
    judged = subjects_report.read(SUBJECTS).get(("sets", "negatives"), {})
    for kind in ("captions", "images"):
        yield Claim(
            "Experts meet fewer false negatives",
            "abstract",
            f"captions that fit an image as well as its own by the dense model, fewer in a batch of {kind}",
            Gain([values["random"] - values[kind] for _, values in sorted(judged.items())]),
        )
    yield Claim("Experts beat LiMoE", "Table 13", "no, nothing of that kind was trained")


def claims_table(records: Records, measured: Measured) -> str:
    """Return a claim a row."""
    rows = [
        [
            claim.words,
            claim.source,
            claim.tested,
            claim.verdict,
            str(claim.gain) if claim.gain and claim.gain.values else "",
        ]
        for claim in claims(records, measured)
    ]
    return table(["claim", "in the paper", "tested here", "verdict", "difference"], rows, words=4)


def claims_count(records: Records, measured: Measured) -> str:
    """Return how many hold."""
    found = claims(records, measured)
    counts = Counter(claim.verdict for claim in found)
    certain = [claim for claim in found if claim.gain and claim.gain.values and len(claim.gain.values) > 1]
    corrected = holm([claim.gain for claim in certain if claim.gain])
    left = [claim for claim, p in zip(certain, corrected, strict=True) if p < 0.05]
    shown = "; ".join(f"{claim.words} ({claim.tested}: {claim.verdict})" for claim in left)
    return (
        f"Of {len(found)} tests, {counts['holds']} say that the claim holds, {counts['does not hold']} that it does "
        f"not, {counts['not certain']} are not certain and {counts['not tested']} could not be made. Where nothing "
        f"is true, one test in twenty looks certain; Holm's correction for their number leaves {len(left)}"
        f"{f': {shown}' if shown else ''}."
    )


def shifts_table(measured: Measured) -> str:
    """Return what mixtures gain on changed pictures, a change a row."""
    rows = []
    for shift in (PLAIN, *measured.shifts):
        dense = list(averages(measured.values(f"{shift}: dense", "tasks")).values())
        if dense:
            gains = [
                measured.gain(f"{shift}: {arm.name}", name, f"{shift}: dense", "tasks")
                for arm in (CAPTIONS, IMAGES)
                for name in WAYS.values()
            ]
            rows.append([shift, interval(dense), *(str(gain) if gain.values else "" for gain in gains)])
    means = [measured.shifted(arm, way) for arm in (CAPTIONS, IMAGES) for way in WAYS]
    if rows and all(gain.values for gain in means):
        every = [averages(measured.values(f"{shift}: dense", "tasks")) for shift in measured.shifts]
        dense = [float(np.mean([of[seed] for of in every])) for seed in every[0]]
        rows.append(["mean over the changes", interval(dense), *map(str, means)])
    columns = ["pictures", "dense", "MoDE-4 of captions, cosines", "log-probabilities"]
    return table([*columns, "MoDE-4 of images, cosines", "log-probabilities"], rows)


def experts_table(measured: Measured) -> str:
    """Return what single experts are as classifiers of labelled icons."""
    rows: list[list[str]] = []
    names = ("zero-shot", "probe", "tuned")

    def add(shown: str, of: Callable[[str], BY_SEED]) -> None:
        found = [list(averages(of(name)).values()) for name in names]
        if any(found):
            rows.append([shown, *map(interval, found)])

    add("dense", lambda name: measured.values("labelled: dense", name))
    row = f"labelled: {CAPTIONS.name}"
    add("best of four experts (by the labels)", measured.best)
    add("mean of four experts", lambda name: {s: np.array([v.mean()]) for s, v in measured.experts(name).items()})
    add("four experts, concatenated", lambda name: measured.values(row, name))
    add("mean of their weights", lambda name: measured.values(f"labelled: mean of {CAPTIONS.name}", name))
    return table(["100 names", "zero-shot", "linear probe", "fine-tuned"], rows)
