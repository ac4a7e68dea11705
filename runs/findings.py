"""What the records of `runs/experiments.jsonl` say in words, with every number computed from them.

`runs/results.py` writes these paragraphs into docs/results.md, so no number in them can differ from the tables. Where
an interval decides between two words, the code chooses (`Gain.is_certain`); the other words are those of the records of
the day, and a reader sees the intervals beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import subjects_report
from costs import laws_of
from experiments import CAPTION_TOKENS, PARTS, QUARTER, Arm, base_arm, training_flops
from records import BY_SEED, Records, averages, interval, label, plain_arms, short, table
from scipy.stats import ttest_1samp

from modeclip.models.flops import count_flops

MINILM_LAYERS, MINILM_WIDTH, MINILM_TOKENS = 6, 384, 5
"""Layers and width of MiniLM; tokens of an icon's name with the two that stand around it."""
IMAGE_ARM, EIGHT_IMAGES = base_arm(encoder="clip-image"), base_arm(encoder="clip-image", experts=8)
FINISHED_IMAGES = base_arm(encoder="clip-image", part=PARTS, extra=8)


@dataclass(frozen=True)
class Gain:
    """How two things differ, seed by seed."""

    values: Sequence[float]

    @classmethod
    def of(cls, scores: BY_SEED, other: BY_SEED, chosen: np.ndarray | None = None) -> Gain:
        """Compare averages over the tasks."""
        mine, theirs = averages(scores, chosen), averages(other, chosen)
        return cls([mine[seed] - theirs[seed] for seed in sorted(mine) if seed in theirs])

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def p(self) -> float:
        """Two-sided probability of such a mean by chance, by Student's t; 1 where a single seed says nothing of it."""
        if len(self.values) < 2:
            return 1.0
        if len(set(self.values)) == 1:
            return 0.0 if self.mean else 1.0
        return float(ttest_1samp(self.values, 0).pvalue)

    @property
    def is_certain(self) -> bool:
        """Whether the 95 % interval leaves 0 out."""
        return self.p < 0.05

    def __str__(self) -> str:
        """Return it with its sign and interval."""
        text = interval(self.values)
        return text if text.startswith("-") else f"+{text}"

    @property
    def size(self) -> str:
        """Return it without its sign."""
        return interval([abs(self.mean) / self.mean * value for value in self.values] if self.mean else self.values)


def at_equal_cost(records: Records, study: str, arm: Arm, how: str = "") -> Gain:
    """Return what a mixture gains on the dense model of its cost; of a finished model that goes on, on it alone."""
    if arm.extra:
        return Gain.of(records.mixed(study, arm, how), records.mixed(study, going_on(arm)))
    return Gain.of(records.mixed(study, arm, how), records.equal(study, arm.cost))


def going_on(arm: Arm) -> Arm:
    """Return the one model that goes on from the same finished model at the same cost."""
    return base_arm(kind="full", experts=1, part=arm.part, extra=arm.extra)


def comparisons(records: Records) -> list[tuple[str, str, Gain]]:
    """Return all mixtures that were compared with the dense model of their cost over several seeds."""
    found = []
    for study in records.studies.values():
        for arm in (arm for arm in study.arms if arm.kind in {"mode", "random", "full"} and arm.experts > 1):
            gain = at_equal_cost(records, study.name, arm)
            if len(gain.values) > 1:
                pairs = study.pairs or records.data["pairs"]
                passes = arm.cost * study.train.samples / PARTS / pairs
                found.append((f"{short(study)}, {pairs:,} pairs, {passes:.1f} passes", label(arm), gain))
    return found


def holm(gains: Sequence[Gain]) -> list[float]:
    """Return the p of each gain, corrected for their number by Holm's rule, in their order."""
    order, most, corrected = np.argsort([gain.p for gain in gains]), 0.0, np.empty(len(gains))
    for rank, place in enumerate(order):
        most = max(most, (len(gains) - rank) * gains[place].p)
        corrected[place] = min(most, 1.0)
    return [float(value) for value in corrected]


def comparisons_table(records: Records) -> str:
    """Return which gains at equal cost are left when one asks how many were looked at."""
    found = comparisons(records)
    corrected = holm([gain for _, _, gain in found])
    rows = [
        [where, name, str(gain), f"{gain.p:.4f}", f"{p:.3f}"]
        for (where, name, gain), p in sorted(zip(found, corrected, strict=True), key=lambda one: one[1])
    ]
    return table(["towers and pairs", "models", "gain at equal cost", "p", "p (Holm)"], rows)


def left_by_holm(records: Records) -> str:
    """Return which of all comparisons at equal cost are certain after a correction for their number."""
    found = comparisons(records)
    corrected = holm([gain for _, _, gain in found])
    said = [f"{name} on {where} ({gain}, p {p:.3f})" for (where, name, gain), p in zip(found, corrected, strict=True)]
    left = [words for words, p in zip(said, corrected, strict=True) if p < 0.05]
    if left:
        return (
            f"**Of {len(found)} comparisons at equal cost, Holm's correction for their number leaves these:** "
            f"{'; '.join(left)}. All others might be chance in so many looks (table below)."
        )
    best = said[int(np.argmin(corrected))]
    return (
        f"**Of {len(found)} comparisons at equal cost none is certain after Holm's correction for their number**; the "
        f"nearest is {best}. The intervals on this page are those of one comparison each: they hold for a question "
        "that was asked before, not for the best of many rows (table below)."
    )


def clustering_cost_table(records: Records) -> str:
    """Return what embedding and clustering cost beside the trainings that they are for."""
    pairs = records.data["pairs"]
    words = pairs * MINILM_TOKENS * 2 * MINILM_LAYERS * 12 * MINILM_WIDTH**2
    rows = []
    for study in records.studies.values():
        if study.pairs or not plain_arms(study):
            continue
        model, training = study.train.model, study.train.samples * training_flops(study.train.model)
        images = pairs * count_flops(model, CAPTION_TOKENS).image
        shares = [f"{100 * cost / training:.0f} %" for cost in (images, words)]
        rows.append([short(study), f"{study.train.samples / 1e6:.2f}", f"{training / 1e12:.1f}", *shares])
    columns = ["towers", "million samples", "TFLOPs", "images by the seed model", "captions by MiniLM"]
    return table(columns, rows)


def _range_of_ratios(records: Records, family: str) -> tuple[float, float]:
    """Return least and largest ratio of a family's compute to dense's, by the laws, where both were measured."""
    result = laws_of(records)
    laws = {law.family: law for law in result.laws}
    errors = {
        name: [float(np.mean(point.errors)) for point in result.points if point.family == name]
        for name in ("dense", family)
    }
    low, high = max(min(values) for values in errors.values()), min(max(values) for values in errors.values())
    ratios = []
    for error in (low, high):
        own, dense = ((laws[name].A.mean / error) ** (1 / laws[name].b.mean) for name in (family, "dense"))
        ratios.append(own / dense)
    return min(ratios), max(ratios)


def findings(records: Records) -> str:
    """Return what was found, a point a line."""
    base, paper = base_arm(), base_arm(budget="paper")
    image4 = at_equal_cost(records, "long-xxxs", IMAGE_ARM)
    image8 = at_equal_cost(records, "long-xxxs", EIGHT_IMAGES)
    small_total = short(records.studies["long-xxxs"])
    passes = records.studies["long-xxxs"].train.samples / records.data["pairs"]
    dense_xs = records.equal("xs", PARTS)
    flops = {name: records.studies[name].train for name in ("xs", "long-xxxs")}
    more = (flops["xs"].samples * training_flops(flops["xs"].model)) / (
        flops["long-xxxs"].samples * training_flops(flops["long-xxxs"].model)
    )
    rates = records.values("data", "rates")[0]
    seconds = (flops["xs"].samples / rates[flops["xs"].model]) / (
        flops["long-xxxs"].samples / rates[flops["long-xxxs"].model]
    )
    four, eight = (Gain.of(records.mixed("long-xxxs", arm), dense_xs) for arm in (IMAGE_ARM, EIGHT_IMAGES))
    others = {
        "`xxs` at 6.2 passes": at_equal_cost(records, "long-xxs", IMAGE_ARM),
        "`xxs` at 3.1 passes": at_equal_cost(records, "main", IMAGE_ARM),
        "a tenth of the pairs seen 125 times": at_equal_cost(records, "long-few", IMAGE_ARM),
        "`xs` at 3.1 passes": at_equal_cost(records, "xs", IMAGE_ARM),
    }
    captions = [
        f"{at_equal_cost(records, study, base)} ({where})"
        for study, where in (
            ("long-xxxs", f"`{small_total}`"),
            ("long-xxs", "`xxs`, 6.2 passes"),
            ("main", "`xxs`, 3.1"),
            ("long-few", "a tenth of the pairs"),
            ("xs", "`xs`"),
        )
    ]
    own = {
        name: Gain.of(records.mixed("main", arm), records.tasks("main", "part-32"))
        for name, arm in {
            "MoDE-2": base_arm(experts=2, budget="paper"),
            "MoDE-4": paper,
            "MoDE-8": base_arm(experts=8, budget="paper"),
            "MoDE-4 of images": base_arm(encoder="clip-image", budget="paper"),
        }.items()
    }
    full_cost = {
        name: at_equal_cost(records, "main", arm)
        for name, arm in {
            "MoDE-2": base_arm(experts=2, budget="paper"),
            "MoDE-4": paper,
            "MoDE-8": base_arm(experts=8, budget="paper"),
            "images": base_arm(encoder="clip-image", budget="paper"),
        }.items()
    }
    logs = {study: at_equal_cost(records, study, base, "log") for study in ("main", "long-few", "long-xxxs")}
    control = {arm.kind: arm for arm in records.studies["main"].arms if arm.kind in {"full", "random"}}
    by_logs = {
        kind: Gain.of(records.mixed("main", base, "log"), records.mixed("main", arm, "log"))
        for kind, arm in control.items()
    }
    full_loss = at_equal_cost(records, "main", control["full"])
    late = Gain.of(records.mixed("main", base_arm(part=27, budget="paper")), records.tasks("main", "part-32"))
    confirmed = {
        budget: Gain.of(records.mixed("main", arm), records.tasks("main", f"{arm.name} uniform"), records.confirmed)
        for budget, arm in (("paper", paper), ("matched", base))
    }
    random = [value["random"]["false"] for value in records.values("main", f"{base.name} negatives").values()]
    of_captions = [value["expert"]["false"] for value in records.values("main", f"{base.name} negatives").values()]
    of_images = [value["expert"]["false"] for value in records.values("main", f"{IMAGE_ARM.name} negatives").values()]
    low, high = _range_of_ratios(records, "MoDE-4 of images matched p16")
    asked = subjects_report.read(Path(__file__).parent / "subjects.jsonl")
    of_images_row, of_all = f"{IMAGE_ARM.name} per_class", f"{control['full'].name} uniform"
    seen, far, full = (
        Gain(subjects_report.gains(asked, "sets", row, far=is_far).mean(axis=1).tolist())
        for row, is_far in ((of_images_row, False), (of_images_row, True), (of_all, False))
    )
    return "\n".join(
        f"- {point}"
        for point in (
            f"**At equal training cost (`matched`), experts on clusters of images beat the dense model of the same "
            f"towers where these are small and trained long; mixtures of experts on clusters of captions nowhere do.** "
            f"Four experts on clusters of the seed model's image vectors, with weights for every image, gain "
            f"{image4.size} points on the smallest towers (`{small_total}`), which have seen every pair {passes:.1f} "
            f"times, and eight {image8.size}. Elsewhere: "
            + "; ".join(
                f"{gain} on {where}{'' if gain.is_certain else ', not certain'}" for where, gain in others.items()
            )
            + f". Experts on clusters of captions: {', '.join(captions)}. The paper finds the opposite (its Table 7: "
            "images 58.1 to 58.3, captions 58.6); its pictures are photographs of many things, ours have a style that "
            "a "
            "model can be an expert of.",
            f"**That gain is one over towers of the same size.** Larger dense towers are as good for about the same "
            f"price: the dense `xs` takes {100 * (more - 1):.0f} % more FLOPs than the smallest towers' training and "
            f"{100 * seconds:.0f} % of its core seconds, and against it four `{small_total}` experts of images stand "
            f"at "
            f"{four}, eight at {eight}. At inference a mixture of images runs the seed model's image tower beside the "
            "experts'.",
            left_by_holm(records),
            f"{image_controls(records)} On `xxs` at 3.1 passes, where it is {seen}, it is {far} without held-out "
            f"images that have a near-copy in training, and four models of all data stand at {full} "
            f"([below](#tasks-of-a-subject-each)): it is neither copies nor their number there. On tasks of a subject "
            "each it is not seen.",
            "**Against the dense model on its own schedule, which is what the paper compares with, every mixture of "
            "the "
            "`paper` budget wins:** "
            + ", ".join(f"{name} {gain.size}" for name, gain in own.items())
            + ", if the experts part half way and are routed by `per_class`. They have cost 1.5 to 4.5 times as much, "
            "and a "
            "dense model of the same cost is better by "
            + ", ".join(f"{gain.size} ({name})" for name, gain in full_cost.items())
            + " points. The paper does not train that model; it is the row that decides here.",
            f"**A good part of what clusters of captions lose is lost between the experts, not in them.** Mixing "
            f"log-probabilities in place of cosines (`--mix log-probabilities`) brings MoDE-4 from "
            f"{at_equal_cost(records, 'main', base)} to {logs['main']} against dense at equal cost; on a tenth of the "
            f"pairs to {logs['long-few']} and on the smallest towers to {logs['long-xxxs']}. With both mixed so, "
            f"MoDE-4 is "
            f"better than its controls: {_said(by_logs['full'])} against Full-4, {_said(by_logs['random'])} against "
            f"Random-4. "
            "By cosines it is not: where the weights differ from class to class, an expert's cosines for its own "
            "classes are not on "
            "the scale of another expert's.",
            f"**What mixtures pay is four short trainings.** Full-4, four models of all data that part at 16 and are "
            f"trained "
            f"a quarter as long each, loses {full_loss.size} points against one dense model, as much as experts do. "
            f"So it is not that an "
            "expert lacks the other three quarters of the data.",
            f"**By the fitted laws, four experts of images need {low:.2f} to {high:.2f} times the dense models' "
            f"compute** "
            "within the range of errors that both were measured at; what the laws say beyond it is no measurement. "
            "That is "
            "of training alone. Equal cost leaves out embedding and clustering (table below): the seed model's "
            "vectors of "
            "all images cost a few percent of a training, MiniLM's vectors of all captions more than the training of "
            "such "
            "small towers, though they are made once for all seeds and recipes. The paper's 35 % are against the L/14 "
            "of "
            "OpenAI and OpenCLIP; on the same 400 million pairs MetaCLIP's dense L/14 (67.1) beats MoDE-4 B/16 (62.1).",
            f"**By their captions, false negatives are not what decides here.** Icon names are short and clean: a "
            f"pair meets "
            f"its own caption, or one of cosine 0.9, {np.mean(random):.3f} times in a batch of 256, and *more* often "
            f"in an "
            f"expert's batch ({np.mean(of_captions):.3f} with captions, {np.mean(of_images):.3f} with images). The "
            f"paper means "
            "images that fit another pair's caption: by the scores of the dense model itself they are no fewer in an "
            "expert's batches ([below](#tasks-of-a-subject-each)), but these are the scores of weak "
            "models, which do not tell a hard negative from a false one.",
            f"**Experts that part at 27 of 32, as published, change nothing** (`paper` {late}): with 6 % of the "
            f"learning rate "
            "left they stay what the seed model is.",
            f"**`per_class` is the default.** On the {int(records.confirmed.sum())} tasks that had no part in "
            f"choosing it, it "
            f"gains {confirmed['paper'].size} points on uniform weights with `paper`; with `matched` it stands at "
            f"{confirmed['matched']}{'' if confirmed['matched'].is_certain else ', which holds 0'}. It beats all "
            f"published "
            "rules, which gain nothing or lose. Where experts have not specialised (parted at 27) no rule matters. "
            "Nothing "
            "clearly beats it among 22 other settings of the weights.",
            probe_finding(records),
        )
    )


def in_short(records: Records, tuned: str = "") -> str:
    """Return the points that README has; `tuned` says what the experts of a quarter gain with rates of their own."""
    main = base_arm()
    image4 = at_equal_cost(records, "long-xxxs", IMAGE_ARM)
    image8 = at_equal_cost(records, "long-xxxs", EIGHT_IMAGES)
    large = records.equal("xs", PARTS)
    four, eight = (Gain.of(records.mixed("long-xxxs", arm), large) for arm in (IMAGE_ARM, EIGHT_IMAGES))
    passes = records.studies["long-xxxs"].train.samples / records.data["pairs"]
    controlled = Gain.of(records.mixed(QUARTER, IMAGE_ARM), records.mixed(QUARTER, base_arm(kind="full")))
    paper = base_arm(budget="paper")
    own = Gain.of(records.mixed("main", paper), records.tasks("main", "part-32"))
    rule = Gain.of(records.mixed("main", paper), records.tasks("main", f"{paper.name} uniform"), records.confirmed)
    points = (
        f"four experts on clusters of *images* beat a dense model of the same towers and cost by {image4.size} points "
        f"where "
        f"these are small and have seen every pair {passes:.1f} times, eight by {image8.size}; against larger dense "
        f"towers of "
        f"about that cost they stand at {four} and {eight}. On a quarter of the pairs four gain "
        f"{at_equal_cost(records, QUARTER, IMAGE_ARM).size}{tuned}, and {controlled.size} on four models of all data, "
        f"so it is the clusters that gain; where a finished model goes on, four of them stand at "
        f"{at_equal_cost(records, QUARTER, FINISHED_IMAGES)} against that model alone;",
        f"experts on clusters of captions stand at {at_equal_cost(records, 'long-xxxs', main)} on those small "
        f"towers and at {at_equal_cost(records, 'main', main)} on larger ones after 3.1 passes;",
        f"against the dense model on its own, shorter schedule, which is the paper's comparison, four experts of "
        f"captions gain "
        f"{own.size}, and `per_class`, our rule that weighs the experts for each class name, gains {rule.size} on "
        f"uniform weights where the published rules gain nothing.",
    )
    return "\n".join(f"- {point}" for point in points)


def _said(gain: Gain) -> str:
    return f"{gain}{'' if gain.is_certain else ' (not certain)'}"


def probe_finding(records: Records) -> str:
    """Return what linear probes say."""
    found = records.values("main", f"{base_arm(budget='paper').name} probe")
    values = {name: [value[name] for value in found.values()] for name in ("MoDE-4", "dense", "dense-total")}
    gain = Gain([mine - dense for mine, dense in zip(values["MoDE-4"], values["dense"], strict=True)])
    return (
        f"**The probe is where specialised experts of captions pay most**, as in the paper's Table 9: on concatenated "
        f"features of four `paper` experts {interval(values['MoDE-4'])}, {gain.size} above dense, and level with the "
        f"dense "
        f"model of their cost ({interval(values['dense-total'])}). Four models of all data (Full-4) bring nothing "
        f"there: it "
        "is the split, not the number. Sums of features are worse than concatenation, as published."
    )


def image_controls(records: Records) -> str:
    """Return whether it is the clusters that the gain of images on the smallest towers comes from."""
    study, images = QUARTER, records.mixed(QUARTER, IMAGE_ARM)
    others = {
        "four models of all data (Full-4)": base_arm(kind="full"),
        "experts of a random split (Random-4)": base_arm(kind="random"),
        "experts of whole icon sets grouped by their images, a control for style": base_arm(encoder="clip-sets"),
    }
    against = {words: Gain.of(images, found) for words, arm in others.items() if (found := records.mixed(study, arm))}
    gain = Gain.of(images, records.equal(study, PARTS))
    if len(gain.values) < 2 or not against:
        return (
            "**The gain of images on the smallest towers has no controls yet.** Full-n and Random-n were not trained "
            "there; it is a finding to test, not a result to build on."
        )
    sure = gain.is_certain and gain.mean > 0
    comes = sure and all(other.is_certain and other.mean > 0 for other in against.values())
    verdict = "comes from its clusters" if comes else "is seen again, its cause is not" if sure else "is not seen again"
    pairs, plan = records.studies[study].pairs, records.studies[study].train
    return (
        f"**With a quarter of the pairs the gain of images on the smallest towers {verdict}.** After the same "
        f"{plan.samples / pairs:.1f} passes over {pairs:,} pairs experts of images stand at {_said(gain)} against the "
        "dense model, at " + ", ".join(f"{_said(other)} against {words}" for words, other in against.items()) + "."
    )


def known_names(records: Records) -> str:
    """Return what experts bring one by one, and what one expert for known names brings."""
    eight = base_arm(experts=8).name
    each = Gain.of(records.tasks("main", f"{eight} first 8"), records.tasks("main", f"{eight} first 0"))
    names, gains = records.data["tasks"], dict[str, Gain]()
    for arm in records.studies["main"].arms:
        if arm.kind == "prior" and (scores := records.tasks("main", arm.name)):
            chosen = np.array([arm.task in {name, "all"} for name in names])
            gains[arm.task] = Gain.of(scores, records.equal("main", PARTS), chosen)
    shown = {"healthicons": "health icons", "twemoji": "emoji", "fa7-brands": "brand logos"}
    found = [f"{_said(gains[task])} on {words}" for task, words in shown.items() if task in gains]
    wide = [f"{gains[task]} ({words})" for task, words in (("game-icons", "`game-icons`"), ("all", "all sets at once"))]
    return (
        f"Experts pay one by one: each of eight adds {each.mean / 8:.2f} points on average, in the order of their "
        f"range "
        f"(`order`). **One expert for known names pays at equal cost**, as in the paper's Sec. 5.5: trained on the "
        f"fine "
        f"clusters nearest to a set's names, a sixth to a half of the pairs, it stands at {', '.join(found)} against "
        f"the dense "
        f"model. Where the names are those of everything it gains nothing clear: {', '.join(wide)} (`prior`). These "
        f"are five "
        "tries on sets that were chosen by hand."
    )


def why_captions(records: Records) -> str:
    """Return where what captions lose is lost."""
    base = base_arm()

    def knows(study: str) -> tuple[str, str, Gain]:
        found = records.values(study, f"{base.name} knowledge").values()
        own = [value["own, among its own classes"] for value in found]
        dense = [value["dense, among the same classes"] for value in found]
        return interval(own), interval(dense), Gain([a - b for a, b in zip(own, dense, strict=True)])

    knowledge = records.values("main", f"{base.name} knowledge").values()
    own = interval([value["own"] for value in knowledge])
    dense = interval(list(averages(records.equal("main", PARTS)).values()))
    main, small, few = knows("main"), knows("long-xxxs"), knows("long-few")
    longer = Gain.of(records.tasks("main", "total-80"), records.tasks("main", "part-32"))
    return (
        f"**Why captions lose at equal cost:** given the expert that each class falls to, without any routing "
        f"(`knowledge`), "
        f"accuracy is {own} with `matched`, the dense model's is {dense}; among an expert's own classes alone, where "
        f"no other "
        f"expert can be taken for the answer, it is {main[0]} against {main[1]} ({main[2]}). These towers are far "
        f"from full (a "
        f"schedule of 80 parts gains {longer.size} points), so capacity is worth little yet. On the smallest towers "
        f"the same "
        f"two numbers are {small[0]} and {small[1]} ({small[2]}), on a tenth of the pairs seen 125 times {few[0]} and "
        f"{few[1]} "
        f"({few[2]}): whether experts know their own classes better is "
        f"{'seen' if small[2].is_certain or few[2].is_certain else 'not certain'} there. At 3.1 passes all ways to "
        f"split captions, "
        "random ones and no split at all (Full-4), cost about the same (`controls`). The paper's models see 400 "
        "million pairs 32 "
        "times before that question is asked."
    )
