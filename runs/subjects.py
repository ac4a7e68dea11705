"""The held-out icons as tasks of a subject each: animals, food, vehicles.

Usage: python runs/subjects.py [--out runs/experiments] [--records runs/subjects.jsonl] [--only tasks|train|measure]

The tasks of `runs/experiments.py` are icon sets, which hold all subjects in one style; the paper's (MoDE Sec. 4) are
subjects: cars, food, aircraft. Here the same held-out images are grouped anew, in two ways:

    wordnet      a name's first noun sense and what it is a kind of, in the order of `KINDS`
    categories   the category that the icon sets that are trained on give to icons of that name most often

    sets         the icon sets themselves, for the same models

A task asks which of the names of its subject an image shows, whatever set drew it. Names of fewer than three letters
are abbreviations and left out. What is kept was decided by numbers alone: at least `FEWEST_CLASSES` names and
`FEWEST_IMAGES` images.

Two more things are measured here. `near` marks held-out images that lie near one of the same name that is trained on:
at 12 pixels they differ by less than 8 of 255 grey levels on average (`runs/icons.yaml`). `negatives` counts, by the
dense model's own scores, how many captions of a batch fit an image at least as well as its own: of random batches, and
of batches of one expert's cluster. The paper's false negatives are such captions (MoDE Sec. 1).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from experiments import PARTS, Study, Workshop, all_jobs, base_arm, read_studies, run_all
from measure import Bench, Exam, Values, Weigh, machine, packed

from modeclip import Catalog
from modeclip.data.tasks.task import CatalogImages, Task, catalog_classification
from modeclip.data.wordnet import WordNet, load_wordnet
from modeclip.models.features import image_features, text_features
from modeclip.models.pool import ModelRef
from modeclip.system.console import log

HERE = Path(__file__).parent
KINDS: dict[str, tuple[str, ...]] = {
    "food": ("food.n.01", "food.n.02"),
    "animals": ("animal.n.01",),
    "plants": ("plant.n.02", "plant_part.n.01"),
    "vehicles": ("conveyance.n.03",),
    "clothing": ("clothing.n.01", "footwear.n.02"),
    "body": ("body_part.n.01",),
    "buildings": ("structure.n.01",),
    "music": ("musical_instrument.n.01",),
    "sports": ("sport.n.01", "sports_equipment.n.01", "game.n.01"),
    "sky": ("atmospheric_phenomenon.n.01", "weather.n.01", "celestial_body.n.01"),
    "furniture": ("furnishing.n.02",),
    "tools": ("tool.n.01", "weapon.n.01"),
    "containers": ("container.n.01",),
    "devices": ("device.n.01",),
    "writing": ("written_communication.n.01",),
    "signs": ("symbol.n.01", "shape.n.02"),
}
"""Subjects, and the synsets of WordNet whose kinds they are; a name belongs to the first that holds it."""
FEWEST_LETTERS, FEWEST_CLASSES, FEWEST_IMAGES = 3, 15, 60
NEAR_PIXELS, NEAR_LEVELS = 12, 8
BATCHES = 40


def subject_of(name: str, wordnet: WordNet, hypernyms: Mapping[str, tuple[str, ...]]) -> str | None:
    """Return the subject of a name by WordNet; None where it is of none."""
    senses = wordnet.senses(name, "n")
    above, waiting = set[str](), [senses[0].name] if senses else []
    while waiting:
        if (kind := waiting.pop()) not in above:
            above.add(kind)
            waiting += hypernyms[kind]
    return next((subject for subject, kinds in KINDS.items() if above & set(kinds)), None)


def group(catalog: Catalog, names: np.ndarray, of_name: Mapping[str, str | None]) -> list[Task]:
    """Return the subjects that have enough names and images as tasks; names: that of each held-out image."""
    found = []
    subjects = np.array([of_name.get(name) or "" for name in names])
    for subject in sorted(set(subjects) - {""}):
        rows = np.flatnonzero(subjects == subject)
        if len(set(names[rows])) >= FEWEST_CLASSES and len(rows) >= FEWEST_IMAGES:
            found.append(catalog_classification(catalog, rows, str(subject)))
    return found


def names_of(catalog: Catalog) -> np.ndarray:
    """Return the captions of a catalog."""
    names: np.ndarray = catalog.read(["caption"])["caption"].astype(str)
    return names


def by_wordnet(held: Catalog) -> list[Task]:
    """Return the held-out images by what their names mean first."""
    wordnet, names = load_wordnet(), names_of(held)
    hypernyms = {synset.name: synset.hypernyms for synset in wordnet.synsets}
    long = sorted({name for name in names.tolist() if len(name) >= FEWEST_LETTERS})
    return group(held, names, {name: subject_of(name, wordnet, hypernyms) for name in long})


def by_categories(held: Catalog, trained: Catalog) -> list[Task]:
    """Return the held-out images by the categories of the icon sets that are trained on."""
    columns, names = trained.read(["caption", "category"]), names_of(held)
    asked, counts = set(names.tolist()), dict[str, Counter[str]]()
    for caption, category in zip(columns["caption"].tolist(), columns["category"].tolist(), strict=True):
        if category and caption in asked and len(caption) >= FEWEST_LETTERS:
            counts.setdefault(caption, Counter())[category] += 1
    most = {name: min(found, key=lambda category: (-found[category], category)) for name, found in counts.items()}
    return group(held, names, most)


class SubjectWorkshop(Workshop):
    """The workshop whose experts for known names are for those of a subject of WordNet."""

    @property
    def held(self) -> Catalog:
        """The held-out images."""
        return Catalog.open(self.out / "data" / "tasks.lance")

    def class_names(self, task: str) -> list[str]:
        """Return the names of a subject."""
        return list(next(subject.classnames for subject in by_wordnet(self.held) if subject.name == task))


def near(exam: Exam, trained: Catalog) -> np.ndarray:
    """Return which images lie near one of the same name that is trained on."""
    captions = names_of(trained)
    shown = np.concatenate([np.array(task.classnames)[task.labels] for task in exam.tasks])
    rows = np.flatnonzero(np.isin(captions, shown))
    known = CatalogImages(catalog=trained, rows=rows)
    theirs, mine, of_name = drawings(known), drawings(exam.images), dict[str, list[int]]()
    for place, name in enumerate(captions[rows].tolist()):
        of_name.setdefault(name, []).append(place)
    found = np.zeros(len(shown), bool)
    for image, name in enumerate(shown.tolist()):
        others = theirs[of_name.get(name, [])]
        found[image] = len(others) and np.abs(others - mine[image]).mean(axis=1).min() < NEAR_LEVELS
    return found


def drawings(images: CatalogImages) -> np.ndarray:
    """Return each image at `NEAR_PIXELS` pixels in grey levels."""
    found = np.empty((len(images), NEAR_PIXELS**2), np.float32)
    for start in range(0, len(images), 4096):
        rows = np.arange(start, min(start + 4096, len(images)))
        small = [image.convert("L").resize((NEAR_PIXELS, NEAR_PIXELS)) for image in images.read(rows)]
        found[rows] = np.array([np.asarray(picture) for picture in small], np.float32).reshape(len(rows), -1)
    return found


def negatives(bench: Bench) -> Values:
    """Return how many captions of a batch, not equal to its own, fit an image at least as well as its own does."""
    catalog, size = bench.workshop.catalog, bench.study.train.batch_size
    captions, random = names_of(catalog), np.random.default_rng(bench.seed)
    columns = {"random": np.zeros(len(captions), int)}
    for name, encoder in (("captions", "minilm"), ("images", "clip-image")):
        _, column = bench.workshop.clustering(base_arm(encoder=encoder), bench.study, bench.seed)
        columns[name] = catalog.read([column])[column]
    batches = {}
    for name, cluster in columns.items():
        experts = cluster[random.choice(len(cluster), BATCHES)]  # an expert as often as it has pairs
        batches[name] = [random.choice(np.flatnonzero(cluster == k), size, replace=False) for k in experts]
    rows = np.unique(np.concatenate([batch for some in batches.values() for batch in some]))
    texts, number = np.unique(captions[rows], return_inverse=True)
    source = [ModelRef.of("dense", bench.model(f"part-{PARTS}"))]
    visual = image_features(source, CatalogImages(catalog=catalog, rows=rows), bench.exam.cache)[0]
    words = text_features(source, texts.tolist(), bench.exam.cache)[0]
    found: Values = {}
    for name, some in batches.items():
        counts = []
        for batch in some:
            at = np.searchsorted(rows, batch)
            scores = visual[at] @ words[number[at]].T
            others = number[at][:, None] != number[at][None]
            counts.append(float(((scores >= scores.diagonal()[:, None]) & others).sum(axis=1).mean()))
        found[name] = round(float(np.mean(counts)), 4)
    return found


def strongest(weigh: Weigh, count: int) -> Weigh:
    """Return weights of the experts that weigh most for each image, so many of them, which sum to 1."""

    def weights(task: int) -> np.ndarray:
        found = weigh(task)
        least = np.sort(found, axis=1)[:, -count]
        found = np.where(found >= least[:, None], found, 0)
        return found / found.sum(axis=1, keepdims=True)

    return weights


def rows_of(bench: Bench, grouping: str) -> Iterator[tuple[str, Values]]:
    """Yield the rows of a study and seed by a grouping of the tasks."""
    yield from bench.rows()
    of_images = base_arm(encoder="clip-image")
    if members := bench.members(of_images):
        for count in (1, 2):
            if (row := f"{of_images.name} strongest {count}") not in bench.recorded:
                hits = bench.exam.hits(members, strongest(bench.weigh(of_images), count), per_image=True)
                yield row, bench.exam.tasks_of(hits) | {"hits": packed(hits)}
        if grouping == "sets" and "negatives" not in bench.recorded:
            yield "negatives", negatives(bench)


def measure(workshop: SubjectWorkshop, studies: list[Study], path: Path) -> None:
    """Write a record for every row that has its models and has none yet."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = [(record["tasks"], record["seed"], record["row"]) for record in map(json.loads, lines)]
    with path.open("a", encoding="utf-8") as file:

        def write(grouping: str, seed: int, row: str, values: Values) -> None:
            file.write(json.dumps({"tasks": grouping, "seed": seed, "row": row, "values": values} | machine()) + "\n")
            file.flush()
            log(f"{grouping}, seed {seed}: {row}")

        groupings = {"sets": [], "wordnet": by_wordnet(workshop.held)}
        groupings["categories"] = by_categories(workshop.held, workshop.catalog)
        for grouping, tasks in groupings.items():
            exam = Exam(workshop.out, tasks)
            if (grouping, 0, "tasks") not in known:
                facts = {"tasks": [task.name for task in exam.tasks], "images": [len(t.images) for t in exam.tasks]}
                facts |= {"classes": [len(task.classnames) for task in exam.tasks]}
                write(grouping, 0, "tasks", facts | {"near": packed(near(exam, workshop.catalog))})
            for study, seed in [(each, number) for each in studies for number in each.seeds]:
                recorded = {row for other, number, row in known if (other, number) == (grouping, seed)}
                bench = Bench(exam=exam, workshop=workshop, study=study, seed=seed, recorded=recorded)
                for row, values in rows_of(bench, grouping):
                    write(grouping, seed, row, values)


def main() -> None:
    """Print the tasks, train what is missing, measure it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--records", type=Path, default=Path("runs/subjects.jsonl"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", choices=("tasks", "train", "measure"))
    arguments = parser.parse_args()
    recipe, studies = read_studies(HERE / "subjects.yaml")
    workshop = SubjectWorkshop(arguments.out, recipe)
    if arguments.only in (None, "tasks"):
        ways = {"wordnet": by_wordnet(workshop.held), "categories": by_categories(workshop.held, workshop.catalog)}
        for way, tasks in ways.items():
            print(f"{way}: {len(tasks)} tasks, {sum(len(task.images) for task in tasks):,} images")
            for task in tasks:
                some = ", ".join(task.classnames[::9][:8])
                print(f"  {task.name:<28}{len(task.classnames):>5} names{len(task.images):>6} images  {some}")
    if arguments.only in (None, "train"):
        run_all(all_jobs(workshop, studies, None), arguments.jobs)
    if arguments.only in (None, "measure"):
        measure(workshop, studies, arguments.records)


if __name__ == "__main__":
    main()
