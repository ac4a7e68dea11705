"""Make the tables of docs/ and README.md, and the words on them, from records.

Usage: python runs/results.py [--records runs/experiments.jsonl] [--check]

The records are those of `runs/measure.py`, `runs/claims.py`, `runs/curation.py`, `runs/noise_found.py`,
`runs/poisoning.py` and `runs/one_model.py`. Tables stand in the pages (`PAGES`) between `<!-- table: NAME -->` and
`<!-- end -->` and are replaced; `--check` only says whether they are those of the records. Intervals are 95 %
t-intervals over the random seeds, differences are taken seed by seed. Beside the records lies `scaling.jsonl` then,
which `modeclip scaling` reads, and beside the page its picture.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import claims_report
import curation_report
import demo_report
import findings
import frontier
import names_report
import noise_found
import numpy as np
import one_model_report
import poisoning
import small_report
import subjects_report
import ways_report
from costs import headline_table, laws_of, scaling_lines, scaling_table, size_table
from experiments import MAIN, PARTS, QUARTER, Arm, base_arm
from records import BY_SEED, Records, against, averages, interval, label, mean, plain_arms, short, table

from modeclip.mixture.rules import RULES
from modeclip.pages.scaling_page import write_scaling

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
DEMO = ("demo.jsonl", "demo_short.jsonl", "pilot.json")
PAGES = (DOCS / "results.md", DOCS / "curation.md", DOCS / "one-model.md", HERE.parent / "README.md")
PAPER = {
    "main": "B/32, 26 tasks: MetaCLIP 58.2 / MoDE-2 58.6 / MoDE-4 59.0 (400M); 59.8 / 61.2 / 61.7 (2.5B)",
    "controls": "B/32, n = 2, 400M / 2.5B: Random 57.7 / 60.0, Full 58.3 / 60.0, OneStep 58.0 / 59.8, "
    "CoarseCluster 58.5 / 60.6, MoDE 58.6 / 61.2",
    "encoders": "B/32, n = 2, 400M: captions by SimCSE 58.6, by the seed 58.3; images by DINOv2 58.1, "
    "by the seed 58.3; images and captions by the seed 58.4; MetaCLIP 58.2",
    "fine": "B/32, n = 2, 400M: M = 2 58.0, 4 58.2, 32 58.4, 256 58.4, 512 58.5, 1,024 58.6, 2,048 58.7; MetaCLIP 58.2",
    "order": "B/32, n from 2 to 32: the average rises with every expert (a plot, no numbers)",
    "prior": "ImageNet, one expert on its class names' clusters against MetaCLIP: B/32 71.4 / 67.6, B/16 75.3 / 72.1, "
    "L/14 80.3 / 79.2",
    "averaging": "B/32, averaged and then fine-tuned on ImageNet: MetaCLIP 73.7, MoDE-2 74.0, MoDE-4 74.2",
    "retrieval": "COCO R@1 text / image, B/16: 59.4 / 41.4 to 62.7 / 44.1 (MoDE-4)",
    "probe": "ImageNet, B/16: 73.8 to 79.6 (MoDE-4, concatenated)",
}


def main_table(records: Records, study: str) -> str:
    """Dense models against data experts, with what each has cost."""
    samples = records.studies[study].train.samples / PARTS
    dense, rows = records.equal(study, PARTS), []

    def add(name: str, parts: int, scores: BY_SEED, equal: BY_SEED) -> None:
        if scores:
            cells = [str(parts), f"{parts * samples / 1e6:.2f}", mean(scores), against(scores, dense)]
            rows.append([name, *cells, against(scores, equal) if equal else ""])

    add("seed model, 16 of 32 parts", 16, records.tasks(study, "part-16"), {})
    add("seed model, 27 of 32 parts", 27, records.tasks(study, "part-27"), {})
    add("dense", PARTS, dense, {})
    for arm in records.studies[study].arms:
        if arm.kind == "total":
            add(f"dense, a schedule of {arm.parts}", arm.parts, records.tasks(study, arm.name), {})
    for arm in plain_arms(records.studies[study]):
        equal = records.equal(study, arm.cost)
        add(label(arm), arm.cost, records.mixed(study, arm), equal)
        add(f"{label(arm)}, log-probabilities", arm.cost, records.mixed(study, arm, "log"), equal)
        add(f"{label(arm)}, uniform", arm.cost, records.mixed(study, arm, "uniform"), equal)
    columns = ["model", "parts", "million samples", "average", "against dense", "against dense of equal cost"]
    return table(columns, rows)


def controls_table(records: Records, study: str) -> str:
    """Several models without clusters, without parts of the data, without fine clusters."""
    base = base_arm()
    logs = {
        "MoDE-4": base,
        "OneStep-4 (M = K)": base_arm(fine=4),
        "Random-4 (uniform)": base_arm(kind="random"),
        "Full-4 (uniform)": base_arm(kind="full"),
    }
    rows = {
        "MoDE-4": f"{base.name} per_class",
        "MoDE-4, uniform": f"{base.name} uniform",
        "CoarseCluster-4 (routed by coarse centres)": f"{base.name} coarse",
        "OneStep-4 (M = K)": f"{base_arm(fine=4).name} per_class",
        "OneStep-4, uniform": f"{base_arm(fine=4).name} uniform",
        "Random-4 (uniform)": f"{base_arm(kind='random').name} uniform",
        "Full-4 (uniform)": f"{base_arm(kind='full').name} uniform",
        "dense": "part-32",
    }
    scores = {name: records.tasks(study, row) for name, row in rows.items()}
    dense, mixture = scores["dense"], scores["MoDE-4"]
    by_logs = {name: records.mixed(study, arm, "log") for name, arm in logs.items()}
    cells = []
    for name, found in scores.items():
        if found:
            own = by_logs.get(name, {})
            mixed = [against(own, by_logs["MoDE-4"]), against(own, dense)] if own else ["", ""]
            cells.append([name, mean(found), against(found, mixture), against(found, dense), *mixed])
    columns = ["at equal cost", "average", "against MoDE-4", "against dense"]
    return table([*columns, "by log-probabilities, against MoDE-4", "against dense"], cells)


def sweep_table(records: Records, study: str, arms: Mapping[str, Arm]) -> str:
    """Arms that differ in one setting, routed by the default rule and uniformly."""
    reference, dense = records.tasks(study, f"{base_arm().name} per_class"), records.equal(study, PARTS)
    rows = []
    for name, arm in arms.items():
        scores, even, logs = (records.mixed(study, arm, how) for how in ("", "uniform", "log"))
        if scores:
            cells = [mean(scores), against(scores, reference), against(scores, dense)]
            rows.append([name, mean(even), *cells, mean(logs), against(logs, dense)])
    columns = ["", "uniform", "per_class", "against the default", "against dense", "log-probabilities", "against dense"]
    return table(columns, rows)


def negatives_table(records: Records, study: str, arms: Mapping[str, Arm]) -> str:
    """What a batch holds beside a pair: the same thing said again, and how near the rest is."""
    found = {name: list(records.values(study, f"{arm.name} negatives").values()) for name, arm in arms.items()}
    found = {name: values for name, values in found.items() if values}
    batches = {"of all pairs": [v["random"] for v in next(iter(found.values()), [])]}
    batches |= {f"of one expert: {name}": [v["expert"] for v in values] for name, values in found.items()}
    rows = [
        [name, *(f"{np.mean([value[key] for value in values]):.3f}" for key in ("same", "false", "cosine"))]
        for name, values in batches.items()
        if values
    ]
    return table(["batches", "same caption", "same, or cosine of 0.9", "mean cosine of the others"], rows)


def rules_table(records: Records, study: str, arm: Arm) -> str:
    """Every rule; and what bounds them: each task's best expert, by the labels."""
    even, tuned = records.tasks(study, f"{arm.name} uniform"), records.tuned
    found = {rule: records.tasks(study, f"{arm.name} {rule}") for rule in ("uniform", *RULES)}
    singles = [records.tasks(study, f"{arm.name} expert {k}") for k in range(arm.experts)]
    by_seed = {seed: np.array([single[seed] for single in singles]) for seed in singles[0]}
    found["best single expert (by the labels)"] = {s: v[v.mean(1).argmax()] for s, v in by_seed.items()}
    found["oracle expert a task (by the labels)"] = {s: v.max(0) for s, v in by_seed.items()}
    rows = [
        [
            name,
            *(mean(scores, chosen) for chosen in (None, tuned, records.confirmed)),
            against(scores, even, records.confirmed),
        ]
        for name, scores in found.items()
        if scores
    ]
    return table(["rule", "all tasks", "tuned", "confirmed", "against uniform (confirmed)"], rows)


def tuned_table(records: Records, what: str, found: Mapping[str, BY_SEED], base: BY_SEED) -> str:
    """Settings in the order of what they reach on the tuned tasks, confirmed on the others."""
    tuned = records.tuned
    found = {name: scores for name, scores in found.items() if scores}
    order = sorted(found, key=lambda name: -float(np.mean(list(averages(found[name], tuned).values()))))
    rows = [
        [
            name,
            mean(found[name], tuned),
            mean(found[name], records.confirmed),
            against(found[name], base, records.confirmed),
        ]
        for name in order
    ]
    return table([what, "tuned", "confirmed", "against per_class 0.1 (confirmed)"], rows)


def candidates_table(records: Records, study: str, arm: Arm) -> str:
    """What tried to beat `per_class`."""
    start = f"{arm.name} try "
    names = dict.fromkeys(line["row"] for line in records.lines if line["row"].startswith(start))
    found = {name.removeprefix(start): records.tasks(study, name) for name in names}
    base = records.tasks(study, f"{arm.name} per_class")
    return tuned_table(records, "setting, best on the tuned tasks first", found, base)


def mixing_table(records: Records, study: str, arm: Arm) -> str:
    """Other ways to bring the experts' cosines together."""
    row = f"{arm.name} mixing"
    ways = next(iter(records.values(study, row).values()), {})
    found = {way: records.tasks(study, row, way) for way in ways}
    return tuned_table(records, "what is weighted and summed", found, found.get("cosines (the rule)", {}))


def probe_table(records: Records, study: str) -> str:
    """Linear probes, each against that of the dense model of the same seed."""
    base, paper = (records.values(study, f"{base_arm(budget=b).name} probe") for b in ("matched", "paper"))
    models = {
        "seed model": (base, "seed"),
        "dense": (base, "dense"),
        "dense, a schedule of 80": (base, "dense-total"),
        "MoDE-4, matched, concatenated": (base, "MoDE-4"),
        "MoDE-4, matched, element-wise sum": (base, "MoDE-4, sum"),
        "MoDE-4, paper, concatenated": (paper, "MoDE-4"),
        "Full-4, matched, concatenated": (base, "Full-4"),
    }
    rows = []
    for shown, (found, name) in models.items():
        values = {seed: np.array([v[name]]) for seed, v in found.items() if name in v}
        if values:
            dense = {seed: np.array([found[seed]["dense"]]) for seed in values}
            rows.append([shown, mean(values), against(values, dense)])
    return table(["linear probe, features of", "accuracy", "against dense"], rows)


def retrieval_table(records: Records, study: str, arms: Sequence[Arm]) -> str:
    """Recall in both directions."""
    ks = [f"{side}_retrieval_recall@{k}" for side in ("text", "image") for k in (1, 5, 10)]
    rows, pairs = [], 0
    for arm in arms:
        found = list(records.values(study, f"{arm.name} retrieval").values())
        for model in next(iter(found), {}):
            if model == "pairs":
                pairs = found[0]["pairs"]
                continue
            single = model in {"seed", "dense", "dense-total"}
            if single and any(row[0] == model for row in rows):
                continue
            cells = [interval([metrics[model][k] for metrics in found if model in metrics]) for k in ks]
            rows.append([model if single else f"{label(arm)}, {model}", *cells])
    return table([f"{pairs:,} images and texts", *(k.replace("_retrieval_recall", "") for k in ks)], rows)


def averaging_table(records: Records, study: str, arms: Sequence[Arm]) -> str:
    """One model whose weights are the mean of the experts'."""
    dense = records.equal(study, PARTS)
    rows = {"seed model": records.tasks(study, "part-16"), "dense": dense}
    for arm in arms:
        rows[f"{label(arm)}: mean of the weights"] = records.tasks(study, f"{arm.name} averaged")
        rows[f"{label(arm)}: four models"] = records.tasks(study, f"{arm.name} per_class")
    return table(["model", "average", "against dense"], [[n, mean(s), against(s, dense)] for n, s in rows.items() if s])


def order_table(records: Records, study: str) -> str:
    """Experts added one by one, the largest range first; the seed stands in for those that are missing."""
    name = base_arm(experts=8).name
    found = {count: records.tasks(study, f"{name} first {count}") for count in range(9)}
    rows = [[str(count), mean(s), against(s, found[0])] for count, s in found.items() if s]
    return table(["experts trained, of eight", "average", "against the seed"], rows)


def prior_table(records: Records, study: str) -> str:
    """One expert for the class names of one task (MoDE Sec. 5.5), on that task."""
    rows = []
    names = records.data["tasks"]
    for arm in records.studies[study].arms:
        found = records.tasks(study, arm.name) if arm.kind == "prior" else {}
        if found:
            chosen = np.array([arm.task in {name, "all"} for name in names])
            pairs = np.mean([values["pairs"][0] for values in records.values(study, arm.name).values()])
            dense = records.equal(study, PARTS)
            others = [mean(s, chosen) for s in (dense, found, records.tasks(study, f"{base_arm().name} per_class"))]
            rows.append([arm.task, f"{pairs:,.0f}", *others, against(found, dense, chosen)])
    columns = ["names of the task", "pairs", "dense", "one expert for them", "MoDE-4", "expert against dense"]
    return table(columns, rows)


def knowledge_table(records: Records, study: str, arm: Arm) -> str:
    """Who knows a class, and where what the experts know is lost."""
    row = f"{arm.name} knowledge"
    found = records.values(study, row)
    rows = {
        "the seed model that they started from": list(averages(records.tasks(study, f"part-{arm.part}")).values()),
        "the other experts": [values["others"] for values in found.values()],
        "the expert whose cluster the class falls into": [values["own"] for values in found.values()],
        "the mixture, per_class": list(averages(records.tasks(study, f"{arm.name} per_class")).values()),
        "dense": list(averages(records.equal(study, PARTS)).values()),
        "dense of equal cost": list(averages(records.equal(study, arm.cost)).values()),
        "that expert, among its own classes alone": [v["own, among its own classes"] for v in found.values()],
        "dense, among the same classes": [v["dense, among the same classes"] for v in found.values()],
    }
    if not found:
        return table([], [])
    if arm.cost == PARTS:
        del rows["dense of equal cost"]
    return table(["on the images of each class", "accuracy"], [[n, interval(v)] for n, v in rows.items()])


def tasks_table(records: Records, study: str, arm: Arm) -> str:
    """Each task: dense of equal cost, the mixture, the expert that each class falls to."""
    dense, mixture = records.equal(study, arm.cost), records.tasks(study, f"{arm.name} per_class")
    own = records.tasks(study, f"{arm.name} knowledge", "own by task")
    largest = records.tasks(study, f"{arm.name} knowledge", "largest share of classes")
    if not (dense and mixture and own):
        return table([], [])
    gain = np.mean([mixture[s] - dense[s] for s in mixture if s in dense], axis=0)
    rows = []
    for index in np.argsort(-gain, kind="stable"):
        only = np.arange(len(gain)) == index
        cells = [mean(dense, only), mean(mixture, only), against(mixture, dense, only), mean(own, only)]
        spread = f"{100 * float(np.mean([values[index] for values in largest.values()])):.0f} %"
        rows.append([records.data["tasks"][index], str(records.data["classes"][index]), *cells, spread])
    columns = [
        "task",
        "classes",
        "dense of equal cost",
        "MoDE",
        "gain",
        "each class's expert",
        "largest expert's classes",
    ]
    return table(columns, rows)


def regime_table(records: Records) -> str:
    """What the split brings at equal cost, by towers, length of the training and the point at which experts part."""
    rows = []
    for study in records.studies.values():
        for arm in [*plain_arms(study), *(arm for arm in study.arms if arm.kind == "full")]:
            scores, logs = records.mixed(study.name, arm), records.mixed(study.name, arm, "log")
            equal = records.equal(study.name, arm.cost)
            if scores and equal:
                pairs = study.pairs or records.data["pairs"]
                passes = arm.cost * study.train.samples / PARTS / pairs
                cells = [short(study), f"{pairs:,}", f"{passes:.1f}", label(arm), mean(equal), mean(scores)]
                rows.append([*cells, against(scores, equal), against(logs, equal)])
    columns = ["towers", "pairs", "passes over them in all", "models", "dense of equal cost", "average"]
    return table([*columns, "gain", "gain by log-probabilities"], rows)


def batches_table(records: Records, study: str) -> str:
    """Dense models whose batches are of one cluster each from the parting on, against random batches of their size."""
    dense, rows = records.equal(study, PARTS), []
    rows.append(["random", "", "", "256", mean(dense), "", ""])
    for arm in records.studies[study].arms:
        if arm.kind in {"pure", "batch"} and (scores := records.tasks(study, arm.name)):
            same = records.tasks(study, f"batch-p{arm.part}-b{arm.batch}") if arm.batch else dense
            of = {"minilm": "captions", "clip-image": "images"}[arm.encoder] if arm.kind == "pure" else ""
            what = [f"of one cluster of {of}", str(arm.experts)] if of else ["random", ""]
            cells = [f"{arm.part} of {PARTS}", str(arm.batch or 256), mean(scores)]
            rows.append([*what, *cells, against(scores, same) if of else "", against(scores, dense)])
    columns = ["batches of the last part", "clusters", "from part", "pairs in a batch", "average"]
    return table([*columns, "against random ones of that size", "against dense"], rows)


def copies_asked(records: Records) -> str:
    """Return which studies were asked images that training has too."""
    before, now = np.array(records.data["images"]), np.array(records.asked["images"])
    copies, names = before - now, records.data["tasks"]
    if not copies.any():
        return ""
    dense = [line for line in records.lines if line["row"] == f"part-{PARTS}"]
    with_copies = dict.fromkeys(line["study"] for line in dense if "hits" not in line["values"])
    most = [f"{names[task]} {copies[task]} of {before[task]}" for task in np.argsort(-copies, kind="stable")[:4]]
    return (
        f" In the studies {', '.join(f'`{study}`' for study in with_copies)} {copies.sum()} of the images are in "
        f"training too, most of them in {', '.join(most)}; the others are asked without them."
    )


def facts_table(records: Records) -> str:
    """Return where and when the records were made."""
    lines = [line for line in records.lines if "machine" in line]
    places = sorted({(line["machine"], line["torch"]) for line in lines})
    days = sorted({line["date"] for line in lines})
    where = "; ".join(f"{machine}, one thread a model, torch {torch}" for machine, torch in places)
    data, when = records.data, " to ".join(dict.fromkeys([days[0], days[-1]]))
    clean = sum(records.asked["images"])
    without = f"{clean:,} without those that training has too, " if clean < sum(data["images"]) else ""
    return (
        f"{data['pairs']:,} pairs; {len(data['tasks'])} tasks, {sum(data['images']):,} images, {without}"
        f"{min(data['classes']):,} to {max(data['classes']):,} classes; {where}; {when}.{copies_asked(records)}"
    )


def all_tables(records: Records) -> dict[str, Callable[[], str]]:
    """Return what makes each table."""
    study, base, paper = MAIN, base_arm(), base_arm(budget="paper")
    subjects = subjects_report.read(HERE / "subjects.jsonl")
    encoders = {
        "MiniLM": "minilm",
        "TF-IDF": "tfidf",
        "seed-CLIP, text": "clip",
        "MiniLM, caption with the icon set's name": "minilm-set",
        "seed-CLIP, image (routed per image)": "clip-image",
        "seed-CLIP, text and image (routed per image)": "clip-both",
    }
    return {
        "facts": lambda: facts_table(records),
        "findings": lambda: f"\n{findings.findings(records)}\n",
        "in-short": lambda: "\n".join(
            [
                "",
                subjects_report.in_short(subjects),
                names_report.in_short(records),
                findings.in_short(records, small_report.tuned(records)),
                "",
            ]
        ),
        "why-captions": lambda: f"\n{findings.why_captions(records)}\n",
        "known-names": lambda: f"\n{findings.known_names(records)}\n",
        "comparisons": lambda: findings.comparisons_table(records),
        "clustering-cost": lambda: findings.clustering_cost_table(records),
        "main": lambda: main_table(records, study),
        "regime": lambda: regime_table(records),
        "controls": lambda: controls_table(records, study),
        "controls-small": lambda: small_report.controls_table(records),
        "routers": lambda: small_report.routers_table(records),
        "trained-parts": lambda: small_report.parts_table(records),
        "rates": lambda: small_report.rates_table(records),
        "rates-found": lambda: f"\n{small_report.rates_found(records)}\n",
        "last-blocks": small_report.last_blocks,
        "finished": lambda: small_report.finished_table(records),
        "finished-found": lambda: small_report.finished_found(records),
        "batches": lambda: batches_table(records, "batches"),
        "batches-small": lambda: batches_table(records, QUARTER),
        "batches-found": lambda: small_report.batches_found(records),
        "frontier-laws": lambda: frontier.laws_table(records),
        "frontier-found": lambda: frontier.tests_found(records),
        "frontier-tests": lambda: frontier.tests_table(records),
        "ways": lambda: ways_report.ways_table(
            ways_report.rows_of(
                records,
                subjects,
                one_model_report.read_lines(HERE / "one_model.jsonl"),
                curation_report.read_lines(HERE / "curation.jsonl"),
            )
        ),
        "names": lambda: names_report.names_table(records),
        "names-found": lambda: f"\n{names_report.found(records)}\n",
        "negatives": lambda: negatives_table(
            records,
            study,
            {f"{k} experts, MiniLM": base_arm(experts=k) for k in (2, 4, 8)}
            | {f"4 experts, {name}": base_arm(encoder=encoder) for name, encoder in list(encoders.items())[1:]},
        ),
        "fine": lambda: sweep_table(
            records, study, {f"M = {m:,}": base_arm(fine=m) for m in (4, 32, 256, 512, 1024, 2048)}
        ),
        "encoders": lambda: sweep_table(
            records, study, {name: base_arm(encoder=encoder) for name, encoder in encoders.items()}
        ),
        "outside": lambda: sweep_table(records, study, {f"{o:g}": base_arm(outside=o) for o in (0.0, 0.02, 0.1, 0.3)}),
        "rules": lambda: rules_table(records, study, base),
        "rules-paper": lambda: rules_table(records, study, paper),
        "rules-late": lambda: rules_table(records, study, base_arm(part=27, budget="paper")),
        "candidates": lambda: candidates_table(records, study, base),
        "candidates-paper": lambda: candidates_table(records, study, paper),
        "mixing": lambda: mixing_table(records, study, base),
        "mixing-paper": lambda: mixing_table(records, study, paper),
        "retrieval": lambda: retrieval_table(records, study, (base, paper)),
        "probe": lambda: probe_table(records, study),
        "averaging": lambda: averaging_table(records, study, (base, paper)),
        "order": lambda: order_table(records, study),
        "prior": lambda: prior_table(records, study),
        "knowledge": lambda: knowledge_table(records, study, base),
        "knowledge-paper": lambda: knowledge_table(records, study, paper),
        "tasks": lambda: tasks_table(records, study, base),
        "sizes": lambda: size_table(records),
        "headline": lambda: headline_table(records),
        "scaling": lambda: scaling_table(records),
        **claims_tables(records),
        **curation_tables(),
        **one_model_tables(),
        **{name: (lambda text=text: text) for name, text in subjects_report.tables(subjects).items()},
        **{
            name: (lambda text=text: text) for name, text in demo_report.tables(*(HERE / name for name in DEMO)).items()
        },
    }


def claims_tables(records: Records) -> dict[str, Callable[[], str]]:
    """Return what makes each table about the claims of the paper."""
    measured = claims_report.Measured(HERE / "claims.jsonl")
    return {
        "claims-count": lambda: claims_report.claims_count(records, measured),
        "claims": lambda: claims_report.claims_table(records, measured),
        "claims-shifts": lambda: claims_report.shifts_table(measured),
        "claims-experts": lambda: claims_report.experts_table(measured),
    }


def curation_tables() -> dict[str, Callable[[], str]]:
    """Return what makes each table about curation."""
    lines, noise = (curation_report.read_lines(HERE / f"{name}.jsonl") for name in ("curation", "noise"))
    return {
        "curation-verdict": lambda: curation_report.verdict(lines),
        "curation-brief": lambda: curation_report.brief(lines),
        "curation-gains": lambda: curation_report.gains_table(lines),
        "curation-kinds": lambda: curation_report.kinds_table(lines),
        "curation-mixtures": lambda: curation_report.mixtures_table(lines),
        "curation-facts": lambda: curation_report.facts(lines),
        "noise": lambda: noise_found.noise_table([line for line in noise if not line.get("study")]),
        "noise-study": lambda: noise_found.noise_table([line for line in noise if line.get("study")]),
        "poisoning-verdict": lambda: poisoning.verdict(poisoning.read(HERE / "poisoning.jsonl")),
        "poisoning": lambda: poisoning.tables(poisoning.read(HERE / "poisoning.jsonl")),
    }


def one_model_tables() -> dict[str, Callable[[], str]]:
    """Return what makes each table about one model out of many."""
    lines, plan = one_model_report.read_lines(HERE / "one_model.jsonl"), one_model_report.read_plan()
    made = one_model_report.named_tables(lines, plan)
    return {name: (lambda text=text: text) for name, text in made.items()}


def written(text: str, records: Records) -> str:
    """Return a page with the tables that it has places for."""
    for name, make in all_tables(records).items():
        if f"<!-- table: {name} -->" in text:
            content = make() + (f"\n\nThe paper: {PAPER[name]}." if name in PAPER else "")
            pattern = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text, flags=re.S)
    return text


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=HERE / "experiments.jsonl")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", nargs="*", default=None, metavar="TABLE", help="print these tables, write nothing")
    arguments = parser.parse_args()
    records = Records(arguments.records)
    if arguments.print is not None:
        for name, make in all_tables(records).items():
            if not arguments.print or name in arguments.print:
                print(f"\n## {name}\n\n{make()}")
        return
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        page = written(text, records)
        if arguments.check and page != text:
            raise SystemExit(f"{path}: tables differ from the records")
        if not arguments.check:
            path.write_text(page, encoding="utf-8")
    if arguments.check:
        return
    lines = "".join(json.dumps(line) + "\n" for line in scaling_lines(records))
    arguments.records.with_name("scaling.jsonl").write_text(lines, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        _, picture = write_scaling(laws_of(records), Path(folder), "mean over 36 tasks of the zero-shot error")
        shutil.copyfile(picture, DOCS / "assets" / picture.name)


if __name__ == "__main__":
    main()
