"""The commands that ask a bundle: route and classify. Parse, call, print."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from modeclip.clustering.class_selection import read_classes
from modeclip.errors import ModeclipError
from modeclip.mixture.rules import RULES, Mix
from modeclip.system.console import console, print_json, print_table

AsJson = Annotated[bool, arg(name="json", help="Print JSON for machines instead of a table.")]
BundlePath = Positional[Annotated[Path, arg(help="Bundle folder, or the id of one on the Hub.")]]
Rule = Annotated[str | None, arg(help=f"Routing rule, one of {', '.join(RULES)}; default: the bundle's.")]
Temperature = Annotated[float | None, arg(help="Temperature of the rule; default: the bundle's, or the rule's own.")]
MaxExperts = Annotated[int | None, arg(help="Use at most so many experts, those with most weight; default: all.")]
MaxMemory = Annotated[float | None, arg(help="Use as many experts as fit into so many GB (10^9 bytes).")]
CLASSES = "A file with one class name a line, or the names with commas: 'cat,dog'."


def route(
    bundle: BundlePath,
    classes: Annotated[str | None, arg(help=CLASSES)] = None,
    rule: Rule = None,
    temperature: Temperature = None,
    *,
    explain: Annotated[bool, arg(help="Show the three nearest fine clusters of each class instead of one.")] = False,
    template: Annotated[tuple[str, ...], arg(help="Route by prompts, {} or {c} for the name, not by names.")] = (),
    each: Annotated[bool, arg(help="Route every text by itself, as queries for images are.")] = False,
    images: Annotated[tuple[Path, ...], arg(help="Route image files, where the clusters are of images.")] = (),
    max_experts: MaxExperts = None,
    max_memory: MaxMemory = None,
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
    pictures = [open_picture(path) for path in images]
    with console.status("loading the encoder"):
        from modeclip.mixture.mode import MoDE

        mode = MoDE.load(bundle, max_experts=max_experts, max_memory=to_bytes(max_memory))
        if images:
            asked = mode.ask(rule, temperature, None)
            found = mode.route_rows([str(path) for path in images], mode.embed_images(pictures), asked, each=True)
        else:
            found = mode.route(names, templates=template or None, rule=rule, temperature=temperature, each=each)
    if picture is not None:
        write_picture(found, picture)
    mean = found.class_weights.mean(axis=0).tolist()
    reasons = found.explain()
    if as_json:
        content: dict[str, Any] = {
            "rule": found.rule,
            "temperature": found.temperature,
            "max_experts": found.asked.max_experts,
            "entropy": found.routing.entropy,
            "experts": list(found.members),
            "weights": mean,
            "classes": [asdict(reason) for reason in reasons],
        }
        print_json(content)
        return
    owners, none = [expert.name for expert in found.bundle.experts], ("",) * len(found.members)
    rows = [
        (
            "" if place else reason.name,
            ", ".join(cluster.captions[:3]),
            f"{cluster.distance:.2f}",
            owners[cluster.expert],
            *(none if place else (f"{weight:.3f}" for weight in reason.weights)),
        )
        for reason in reasons
        for place, cluster in enumerate(reason.clusters if explain else reason.clusters[:1])
    ]
    rows.append(("all classes", "", "", "", *(f"{weight:.3f}" for weight in mean)))
    title = f"rule {found.rule}, temperature {found.temperature:g}, entropy {found.routing.entropy:.3f} nats"
    print_table(title, ["class", "nearest fine cluster", "distance", "its expert", *found.members], rows)
    if picture is not None:
        print(picture)


def classify(
    bundle: BundlePath,
    pictures: Positional[Annotated[tuple[Path, ...], arg(help="Image files.")]],
    classes: Annotated[str, arg(help=CLASSES)],
    rule: Rule = None,
    top: Annotated[int, arg(help="Classes shown for each picture.")] = 5,
    *,
    template: Annotated[tuple[str, ...], arg(help="Prompts, {} or {c} for the name; default: the bundle's.")] = (),
    route_by_prompts: Annotated[bool, arg(help="Route by the prompts instead of the plain class names.")] = False,
    temperature: Temperature = None,
    max_experts: MaxExperts = None,
    max_memory: MaxMemory = None,
    mix: Annotated[Mix, arg(help="What of the experts is weighted and summed.")] = "cosines",
    as_json: AsJson = False,
) -> None:
    """Name the class of pictures, by the experts that the class names are routed to."""
    if top < 1:
        raise ModeclipError(f"top: expected 1 class or more, got {top}")
    names = read_classes(classes)
    if not pictures:
        raise ModeclipError("classify: no picture given; modeclip classify BUNDLE PICTURE... --classes CLASSES")
    images = [open_picture(path) for path in pictures]
    with console.status("loading the encoder and the experts"):
        from modeclip.mixture.mode import MoDE

        mode = MoDE.load(bundle, max_experts=max_experts, max_memory=to_bytes(max_memory))
        task = mode.task(
            names,
            templates=template or None,
            route_by_prompts=route_by_prompts,
            rule=rule,
            temperature=temperature,
        )
        predictions = task.classify(images, mix)
    best = [list(zip(p.classnames, p.probabilities, strict=True))[:top] for p in predictions]
    if as_json:
        print_json(
            [
                {"picture": str(path), "classes": [{"name": name, "probability": share} for name, share in shown]}
                for path, shown in zip(pictures, best, strict=True)
            ]
        )
        return
    for path, shown in zip(pictures, best, strict=True):
        print_table(str(path), ["class", "probability"], [(name, f"{share:.3f}") for name, share in shown])


def open_picture(path: Path) -> Any:
    """Return a picture file, decoded, or one line that says why it cannot be."""
    from modeclip.data.images import cause_of, decode_image

    try:
        return decode_image(path.read_bytes())
    except FileNotFoundError:
        raise ModeclipError(f"picture {path}: no such file") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise ModeclipError(f"picture {path}: {cause_of(error)}; give an image file that opens") from None


def to_bytes(gigabytes: float | None) -> int | None:
    """Return what ``--max-memory`` asks for, in bytes."""
    if gigabytes is None:
        return None
    if not 0 < gigabytes < math.inf:
        raise ModeclipError(f"max_memory: expected a number of GB above 0, got {gigabytes:g}")
    return int(gigabytes * 1e9)
