"""The commands for new data and an existing bundle: assign, extend, bundle. Parse, call, print."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from modeclip.commands.data import AsJson, CatalogPath, Ray
from modeclip.errors import ModeclipError
from modeclip.mixture.assigning import AssignConfig
from modeclip.mixture.extending import ExtendConfig
from modeclip.system.console import print_json, print_table

BundleFolder = Positional[Annotated[Path, arg(help="Folder of the bundle.")]]
FittedOn = Annotated[
    str | None,
    arg(name="catalog", help="The clustered catalog that the bundle was made from; for bundles without quantiles."),
]
ASSIGNED = ["expert", "its pairs", "new pairs", "novel", "share"]


@dataclass(frozen=True, kw_only=True)
class AssignOptions(AssignConfig):
    """What counts as novel, and what is worth training."""

    def __post_init__(self) -> None:
        """Leave the checks to the `AssignConfig` that is made of it, whose errors are one line."""


@dataclass(frozen=True, kw_only=True)
class ExtendOptions(ExtendConfig):
    """How an expert is continued or added."""

    def __post_init__(self) -> None:
        """Leave the checks to the `ExtendConfig` that is made of it, whose errors are one line."""


def assign(
    pairs: CatalogPath,
    bundle: Annotated[str, arg(help="Bundle folder, or the id of one on the Hub.")],
    *,
    thresholds: OmitArgPrefixes[AssignOptions] = AssignOptions(),
    fitted_on: FittedOn = None,
    ray: Ray = False,
    as_json: AsJson = False,
) -> None:
    """Assign new pairs to a bundle's clusters, mark the novel ones, and propose what to train."""
    from modeclip.data.catalog import Catalog
    from modeclip.mixture.assigning import assign as run_assign
    from modeclip.mixture.bundle import load_bundle

    config = AssignConfig(**asdict(thresholds))
    opened, fitted = Catalog.open(pairs), Catalog.open(fitted_on) if fitted_on else None
    result = run_assign(opened, load_bundle(bundle), config, fitted_on=fitted, ray=ray)
    if as_json:
        print_json(result.to_json())
        return
    print_table(f"{pairs}: {result.num_pairs:,} pairs, by chance {result.chance:g} novel", ASSIGNED, result.rows())
    for proposal in result.proposals:
        action = "train a new expert" if proposal.action == "new" else f"continue expert-{proposal.expert}"
        print(f"worth doing: {action} on {proposal.num_pairs:,} pairs ({proposal.reason})")
    if not result.proposals:
        print("nothing is worth training: too few pairs inside each expert's clusters, and too few novel ones")


def extend(
    bundle: BundleFolder,
    pairs: CatalogPath,
    out: Annotated[Path, arg(help="Folder of the training; give it again to go on.")],
    *,
    expert: Annotated[int | None, arg(help="Continue this expert; default: what is proposed.")] = None,
    new: Annotated[bool, arg(help="Train a new expert on the novel pairs.")] = False,
    thresholds: OmitArgPrefixes[AssignOptions] = AssignOptions(),
    training: OmitArgPrefixes[ExtendOptions] = ExtendOptions(),
    fitted_on: FittedOn = None,
    as_json: AsJson = False,
) -> None:
    """Continue an expert of a bundle on new pairs, or add a new one for them; the others stay as they are."""
    from modeclip.data.catalog import Catalog
    from modeclip.mixture.extending import extend as run_extend

    if new and expert is not None:
        raise ModeclipError("extend: --expert and --new exclude each other; give one of them")
    action: int | Literal["new"] | None = "new" if new else expert
    result = run_extend(
        bundle,
        Catalog.open(pairs),
        out,
        action=action,
        thresholds=AssignConfig(**asdict(thresholds)),
        config=ExtendConfig(**asdict(training)),
        fitted_on=Catalog.open(fitted_on) if fitted_on else None,
    )
    if as_json:
        print_json(asdict(result))
        return
    done = "added" if result.action == "new" else "continued"
    print(f"{bundle}: expert-{result.expert} {done} on {result.num_pairs:,} pairs, {result.samples:,} samples")


def bundle(
    bundle: BundleFolder,
    *,
    put: Annotated[
        tuple[str, ...], arg(help="expert-2=FOLDER: put that model in the place of an expert, or of a missing one.")
    ] = (),
    force: Annotated[bool, arg(help="Do not ask which seed and clustering it comes from.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a bundle consists of and where it came from; replace or fill in experts."""
    from modeclip.mixture.bundle import SEED, load_bundle
    from modeclip.mixture.bundle_edits import replace_expert

    for text in put:
        number, folder = _parse_put(text)
        replace_expert(bundle, number, folder, force=force)
    opened = load_bundle(bundle)
    if as_json:
        content: dict[str, object] = {"path": str(opened.path), "rule": opened.rule, "encoder": opened.encoder}
        content |= {"num_fine": len(opened.fine_centers), "quantiles": opened.fine_quantiles is not None}
        print_json(content | {"experts": [asdict(expert) for expert in opened.experts], "lineage": opened.lineage})
        return
    rows = []
    for index, expert in enumerate(opened.experts):
        megabytes = sum(file.stat().st_size for file in opened.model_folder(index).iterdir()) / 1e6
        model = f"{expert.folder} ({megabytes:,.0f} MB)" + (", stands in" if expert.folder == SEED else "")
        fine = str(int((opened.expert_of_fine == index).sum()))
        rows.append((expert.name, model, f"{expert.size:,}", fine, ", ".join(expert.keywords)))
    title = f"{bundle}: {len(opened.fine_centers):,} fine clusters, rule {opened.rule}, encoder {opened.encoder}"
    print_table(title, ["expert", "model", "pairs", "fine clusters", "key words"], rows)
    made = [f"{name} {job}" for name, job in opened.lineage.get("jobs", {}).items()]
    print(f"made from jobs: {', '.join(made) or 'unknown'}")
    for edit in opened.edits:
        pairs = f"{edit['pairs']:,} pairs" if "pairs" in edit else "an unknown number of pairs"
        print(
            f"{edit['date']}  {edit['action']} {edit['expert']}: job {edit['job'] or 'none'}, {pairs}"
            f" of {edit.get('catalog', 'an unnamed catalog')}{', forced' if edit['forced'] else ''}"
        )


def _parse_put(text: str) -> tuple[int, Path]:
    """Return number and folder of ``expert-2=FOLDER``."""
    from modeclip.training.jobs import role_of

    name, _, folder = text.partition("=")
    role, index = role_of(name)
    if not folder or role != "expert" or index is None:
        raise ModeclipError(f"--put {text}: expected an expert and a folder, such as expert-2=models/expert-2")
    return index, Path(folder)
