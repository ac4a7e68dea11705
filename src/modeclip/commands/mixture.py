"""The commands that use a bundle (route, classify) or change it for new data (assign, extend, bundle)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from modeclip.data.prompts import read_classes
from modeclip.errors import ModeclipError
from modeclip.mixture.assigning import AssignConfig
from modeclip.mixture.explain import flag, warning
from modeclip.mixture.extending import ExtendConfig
from modeclip.mixture.rules import RULES, Mix
from modeclip.system.console import busy, log, print_json, print_lines, print_table
from modeclip.system.devices import choose_device
from modeclip.system.options import AsJson, CatalogPath, Mask, MaxMemory, Ray, UserEncoder, Where, to_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

    from modeclip.mixture.explain import ClassReason
    from modeclip.mixture.mode import MoDE

BundlePath = Positional[Annotated[Path, arg(help="Bundle folder, or the id of one on the Hub.")]]
Rule = Annotated[str | None, arg(help=f"Routing rule, one of {', '.join(RULES)}; default: the bundle's.")]
Temperature = Annotated[float | None, arg(help="Temperature of the rule; default: the bundle's, or the rule's own.")]
MaxExperts = Annotated[int | None, arg(help="Use at most this many experts, those with the most weight; default: all.")]
OneExpert = Annotated[
    str | None, arg(help="Ask this expert alone, such as one that train-experts --for-classes trained (expert-NAME).")
]
CLASSES = "A file with one class name on each line, or the names with commas: 'cat,dog'."
BundleFolder = Positional[Annotated[Path, arg(help="Folder of the bundle.")]]
FittedOn = Annotated[
    str | None,
    arg(name="catalog", help="The clustered catalog that the bundle was made from; for bundles without quantiles."),
]
PICTURES_AT_ONCE = 64
"""Pictures that are in memory at a time."""
ASSIGNED = ["expert", "its pairs", "new pairs", "novel", "share"]


def route(
    bundle: BundlePath,
    classes: Annotated[str | None, arg(help=CLASSES)] = None,
    rule: Rule = None,
    temperature: Temperature = None,
    *,
    explain: Annotated[bool, arg(help="Show the three nearest fine clusters of each class instead of one.")] = False,
    template: Annotated[tuple[str, ...], arg(help="Route by prompts ({} or {c} for the name) instead of names.")] = (),
    each: Annotated[bool, arg(help="Route every text by itself, as queries for images are routed.")] = False,
    images: Annotated[
        tuple[Path, ...], arg(help="Route image files, or all in folders, where the clusters are of images.")
    ] = (),
    max_experts: MaxExperts = None,
    max_memory: MaxMemory = None,
    expert: OneExpert = None,
    encoder: UserEncoder = None,
    picture: Annotated[Path | None, arg(help="Draw the explanation to this file, .svg or .png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which experts a task is routed to, and why: nearest fine clusters, example captions, weights, entropy."""
    if (classes is None) != bool(images):
        raise ModeclipError("route: give either --classes (names or a file) or --images, for clusters of images")
    if picture is not None:
        from modeclip.pages.route_picture import check_picture, write_picture

        check_picture(picture)
    names = read_classes(classes) if classes is not None else []
    read: list[tuple[Path, Image]] = []
    bad: list[str] = []
    for path, one in read_pictures(find_pictures(images)):
        bad.append(one) if isinstance(one, str) else read.append((path, one))
    if images and not read:
        raise _none_readable("route", bad)
    with busy("loading the encoder"):
        mode = _open_mixture(bundle, max_experts, max_memory, expert, encoder)
        if images:
            request = mode.request(rule=rule, temperature=temperature)
            found = mode.router.route_images([one for _, one in read], request, [str(path) for path, _ in read])
        else:
            found = mode.route(names, templates=template or None, rule=rule, temperature=temperature, each=each)
    if picture is not None:
        write_picture(found, picture)
    mean = found.class_weights.mean(axis=0).tolist()
    reasons = found.explain()
    if as_json:
        content: dict[str, Any] = {
            "rule": found.request.rule,
            "temperature": found.request.temperature,
            "max_experts": found.request.max_experts,
            "entropy": found.entropy,
            "experts": list(found.members),
            "weights": mean,
            **flag(found.domain),
            "classes": [asdict(reason) for reason in reasons],
        }
        print_json(content)
        return
    none = ("",) * len(found.members)
    rows = [
        (
            "" if place else reason.name,
            ", ".join(cluster.captions[:3]),
            f"{cluster.distance:.2f}",
            "" if place or reason.quantile is None else f"{reason.quantile:.1%}{' !' if reason.out_of_domain else ''}",
            found.members[cluster.expert],
            *(none if place else (f"{weight:.3f}" for weight in reason.weights)),
        )
        for reason in reasons
        for place, cluster in enumerate(reason.clusters if explain else reason.clusters[:1])
    ]
    rows.append(("all classes", "", "", "", "", *(f"{weight:.3f}" for weight in mean)))
    asked = found.request
    title = f"rule {asked.rule}, temperature {asked.temperature:g}, entropy {found.entropy:.3f} nats"
    print_table(
        title, ["class", "nearest fine cluster", "distance", "nearer captions", "its expert", *found.members], rows
    )
    if words := warning(found.classnames, found.domain):
        log(words)
    if picture is not None:
        print_lines(picture)


def classify(
    bundle: BundlePath,
    pictures: Positional[
        Annotated[tuple[Path, ...], arg(help="Image files, or folders with image files at any depth.")]
    ],
    classes: Annotated[str, arg(help=CLASSES)],
    rule: Rule = None,
    top: Annotated[int, arg(help="Classes shown for each picture.")] = 5,
    *,
    template: Annotated[tuple[str, ...], arg(help="Prompts with {} or {c} for the name; default: the bundle's.")] = (),
    route_by_prompts: Annotated[bool, arg(help="Route by the prompts instead of the plain class names.")] = False,
    temperature: Temperature = None,
    max_experts: MaxExperts = None,
    max_memory: MaxMemory = None,
    expert: OneExpert = None,
    encoder: UserEncoder = None,
    mix: Annotated[
        Mix, arg(help="What is weighted and summed: the experts' cosines or log-probabilities.")
    ] = "cosines",
    device: Annotated[str, arg(help="Where it computes: auto, cpu, cuda.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Name the class of each picture, by the experts that the class names are routed to.

    Pictures that cannot be read are named and counted, and the others answered; the exit code is 2 if there are none.
    """
    if top < 1:
        raise ModeclipError(f"--top: expected 1 class or more, got {top}")
    names = read_classes(classes)
    if not pictures:
        raise ModeclipError(
            "classify: no picture given; give image files: modeclip classify BUNDLE PICTURE... --classes CLASSES"
        )
    paths = find_pictures(pictures)
    with busy("loading the encoder and the experts"):
        mode = _open_mixture(bundle, max_experts, max_memory, expert, encoder)
        task = mode.task(
            names,
            templates=template or None,
            route_by_prompts=route_by_prompts,
            rule=rule,
            temperature=temperature,
        ).to(choose_device(device))
    domain = task.route.domain
    flags = {} if task.route.per_image else {reason.name: reason for reason in task.explain()}
    if words := warning(names, domain):
        log(words)
    records: list[dict[str, Any]] = []
    reading = read_pictures(paths)
    while part := list(islice(reading, PICTURES_AT_ONCE)):
        answers = iter(task.classify([found for _, found in part if not isinstance(found, str)], mix))
        for path, found in part:
            if isinstance(found, str):
                records.append({"picture": str(path), "error": found})
                continue
            answer = next(answers)
            best = list(zip(answer.classnames, answer.probabilities, strict=True))[:top]
            shown = [{"name": name, "probability": share} | _flag_of(flags.get(name)) for name, share in best]
            records.append({"picture": str(path), **flag(answer.domain or domain), "classes": shown})
            if not as_json:
                print_table(str(path), ["class", "probability"], [(name, f"{share:.3f}") for name, share in best])
            if words := warning([str(path)], answer.domain):
                log(words)
    if as_json:
        print_json(records)
    bad = [record["error"] for record in records if "error" in record]
    if len(bad) == len(records):
        raise _none_readable("classify", bad)
    if bad:
        log(f"classify: {len(bad):,} of {len(records):,} pictures cannot be read; each is named above")


def assign(
    pairs: CatalogPath,
    bundle: Annotated[str, arg(help="Bundle folder, or the id of one on the Hub.")],
    *,
    thresholds: OmitArgPrefixes[AssignConfig],
    fitted_on: FittedOn = None,
    where: Where = (),
    mask: Mask = None,
    encoder: UserEncoder = None,
    ray: Ray = False,
    as_json: AsJson = False,
) -> None:
    """Assign new pairs to a bundle's clusters, mark the novel ones, and propose what to train."""
    from modeclip.data.catalog import Catalog
    from modeclip.data.selection import Selection
    from modeclip.mixture.assigning import assign as run_assign
    from modeclip.mixture.bundle import load_bundle

    opened, fitted = Catalog.open(pairs), Catalog.open(fitted_on) if fitted_on else None
    selection, found = Selection(where=where, mask=mask), load_bundle(bundle, encoder=encoder)
    result = run_assign(opened, found, thresholds, fitted_on=fitted, selection=selection, ray=ray)
    if as_json:
        print_json(result.to_json())
        return
    print_table(f"{pairs}: {result.num_pairs:,} pairs, by chance {result.chance:g} novel", ASSIGNED, result.rows())
    for proposal in result.proposals:
        action = "train a new expert" if proposal.action == "new" else f"continue expert-{proposal.expert}"
        print_lines(f"worth doing: {action} on {proposal.num_pairs:,} pairs ({proposal.reason})")
    if not result.proposals:
        print_lines(
            "nothing is worth training: too few pairs lie inside the clusters of an expert, and too few are novel"
        )


def extend(
    bundle: BundleFolder,
    pairs: CatalogPath,
    out: Annotated[Path, arg(help="Folder of the training; give it again to continue.")],
    *,
    expert: Annotated[int | None, arg(help="Continue this expert; default: what is proposed.")] = None,
    new: Annotated[bool, arg(help="Train a new expert on the novel pairs.")] = False,
    thresholds: OmitArgPrefixes[AssignConfig],
    training: OmitArgPrefixes[ExtendConfig],
    fitted_on: FittedOn = None,
    where: Where = (),
    mask: Mask = None,
    encoder: UserEncoder = None,
    as_json: AsJson = False,
) -> None:
    """Continue an expert of a bundle on new pairs, or add a new one for them; the others stay as they are."""
    from modeclip.data.catalog import Catalog
    from modeclip.data.selection import Selection
    from modeclip.mixture.extending import extend as run_extend

    if new and expert is not None:
        raise ModeclipError("extend: --expert and --new exclude each other; give one of the two")
    action: int | Literal["new"] | None = "new" if new else expert
    result = run_extend(
        bundle,
        Catalog.open(pairs),
        out,
        action=action,
        thresholds=thresholds,
        config=training,
        fitted_on=Catalog.open(fitted_on) if fitted_on else None,
        selection=Selection(where=where, mask=mask),
        encoder=encoder,
    )
    if as_json:
        print_json(asdict(result) | {"passes": result.passes})
        return
    done = "added" if result.action == "new" else "continued"
    print_lines(
        f"{bundle}: expert-{result.expert} {done} on {result.num_pairs:,} pairs, {result.samples:,} samples, "
        f"{result.passes:,.1f} passes over them"
    )


def bundle(
    bundle: BundleFolder,
    *,
    put: Annotated[
        tuple[str, ...], arg(help="expert-2=FOLDER: replace an expert by that model, or fill in a missing one.")
    ] = (),
    force: Annotated[bool, arg(help="Skip the check that a model comes from the same seed and clustering.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a bundle consists of and where it came from; replace or fill in experts."""
    from modeclip.mixture.bundle import check_files, load_bundle
    from modeclip.mixture.bundle_edits import replace_experts
    from modeclip.mixture.manifest import SEED

    models: dict[int, Path] = {}
    for text in put:
        number, folder = _parse_put(text)
        if number in models:
            raise ModeclipError(f"--put {text}: expert-{number} is given twice; give one model for it")
        models[number] = folder
    if models:
        replace_experts(bundle, models, force=force)
    opened = load_bundle(bundle)
    check_files(opened)
    if as_json:
        content: dict[str, object] = {"path": str(opened.path), "rule": opened.routing.rule, "encoder": opened.encoder}
        content |= {"num_fine": len(opened.fine_centers), "quantiles": opened.fine_quantiles is not None}
        content |= {"experts": [asdict(expert) for expert in opened.experts]}
        content["class_experts"] = [asdict(expert) for expert in opened.class_experts]
        print_json(content | {"lineage": opened.lineage})
        return
    rows = []
    for index, expert in enumerate(opened.experts):
        megabytes = sum(file.stat().st_size for file in opened.model_folder(index).iterdir()) / 1e6
        model = f"{expert.folder} ({megabytes:,.0f} MB)" + (", stands in" if expert.folder == SEED else "")
        fine = str(int((opened.expert_of_fine == index).sum()))
        rows.append((expert.name, model, f"{expert.size:,}", fine, ", ".join(expert.keywords)))
    for expert in opened.class_experts:
        rows.append((expert.name, f"{expert.folder}, for class names (--expert)", f"{expert.size:,}", "", ""))
    title = (
        f"{bundle}: {len(opened.fine_centers):,} fine clusters, rule {opened.routing.rule}, encoder {opened.encoder}"
    )
    print_table(title, ["expert", "model", "pairs", "fine clusters", "key words"], rows)
    made = [f"{name} {job}" for name, job in opened.lineage.get("jobs", {}).items()]
    print_lines(f"made from jobs: {', '.join(made) or 'unknown'}")
    for edit in opened.edits:
        pairs = f"{edit['pairs']:,} pairs" if "pairs" in edit else "an unknown number of pairs"
        print_lines(
            f"{edit['date']}  {edit['action']} {edit['expert']}: job {edit['job'] or 'none'}, {pairs}"
            f" of {edit.get('catalog', 'an unnamed catalog')}{', forced' if edit['forced'] else ''}"
        )


def _open_mixture(
    bundle: Path, max_experts: int | None, max_memory: float | None, expert: str | None, encoder: str | None
) -> MoDE:
    from modeclip.mixture.mode import MoDE

    return MoDE.load(bundle, max_experts=max_experts, max_memory=to_bytes(max_memory), expert=expert, encoder=encoder)


def _parse_put(text: str) -> tuple[int, Path]:
    """Return the number and the folder of ``expert-2=FOLDER``."""
    from modeclip.training.jobs import role_of

    name, _, folder = text.partition("=")
    role, index = role_of(name)
    if not folder or role != "expert" or index is None:
        raise ModeclipError(f"--put {text}: expected an expert and a folder, such as expert-2=models/expert-2")
    return index, Path(folder)


def _flag_of(reason: ClassReason | None) -> dict[str, object]:
    """Return the flag of one class as JSON, with what it rests on."""
    if reason is None:
        return {"out_of_domain": None, "distance": None, "quantile": None}
    return {"out_of_domain": reason.out_of_domain, "distance": reason.distance, "quantile": reason.quantile}


def _none_readable(command: str, problems: Sequence[str]) -> ModeclipError:
    if len(problems) == 1:
        return ModeclipError(problems[0])
    return ModeclipError(f"{command}: none of {len(problems):,} pictures can be read, first {problems[0]}")


def find_pictures(places: Sequence[Path]) -> list[Path]:
    """Return image files: those given, and those in the folders given and in folders below, sorted by folder.

    Files of a folder that are no pictures by their names are counted in a note.

    Raises:
        ModeclipError: A folder holds no picture.
    """
    from modeclip.data.tasks.layouts import FILE_SUFFIXES
    from modeclip.system.paths import walk

    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            found.append(place)
            continue
        own: list[Path] = []
        others = 0
        for folder in walk(str(place)):
            below = place / folder.path
            if folder.unreadable:
                log(f"{below}: {folder.unreadable.lower()}; its pictures are left out")
            names = [*folder.files, *folder.broken]
            own += [below / name for name in names if name.lower().endswith(FILE_SUFFIXES)]
            others += sum(not name.lower().endswith(FILE_SUFFIXES) for name in names)
        if not own:
            raise ModeclipError(f"folder {place}: holds no picture ({', '.join(FILE_SUFFIXES)}); give another folder")
        if others:
            log(f"{place}: files that are no pictures by their names, left out: {others:,}")
        found += own
    return found


def read_pictures(paths: Iterable[Path]) -> Iterator[tuple[Path, Image | str]]:
    """Yield each file with its picture, or with what is wrong with it, which is also said in a line."""
    from modeclip.data.images import open_picture

    for path in paths:
        try:
            picture: Image | str = open_picture(path)
        except ModeclipError as error:
            picture = str(error)
            log(picture)
        yield path, picture
