"""The card of an exported model: a README.md as the Hugging Face Hub reads it, of facts that lie beside the model.

What a model was made from is read from the files that training, fine-tuning, averaging, upcycling and distillation
leave beside it, and from the lineage of a bundle. What no file says is not made up: the card says that it is not
recorded. Folders are named by their last part alone, since a card is published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from modeclip.errors import DamagedError, ModeclipError
from modeclip.mixture.manifest import MANIFEST_FILE
from modeclip.system.files import read_json

CARD_FILE = "README.md"
_RECORDS = {
    "job.json": "Training",
    "finetune.json": "Fine-tuning",
    "merge.json": "Average of weights",
    "upcycling.json": "Upcycling to a CLIP-MoE",
    "distillation.json": "Distillation",
}
"""Files that say what a model was made from, in its folder or in the one around it."""
_MOST_FACTS = 30
_MOST_LETTERS = 80
_PLACES = re.compile(r"(?:local-dir:|~)?/\S+")


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model reaches on one held-out task."""

    task: str
    """Name of the task."""
    metric: str
    """Name of its main metric."""
    value: float
    """The metric, as a fraction."""
    num_images: int
    """Images that it was measured on."""


def write_card(
    folder: Path,
    *,
    name: str,
    source: Path | None,
    kind: str,
    usage: str,
    license: str,
    scores: Sequence[Score],
    rows: Sequence[str] = (),
) -> None:
    """Write the card of a model into its folder.

    Args:
        folder: The folder.
        name: Title of the model.
        source: Where it was exported from, if that is a folder.
        kind: ``onnx``, ``transformers`` or ``open_clip``.
        usage: Lines of Python that load it.
        license: Its licence, as the Hub spells it.
        scores: What it reaches on held-out tasks.
        rows: Further lines about the export.
    """
    head: dict[str, Any] = {
        "license": license,
        "library_name": kind,
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "modeclip", *(["onnx"] if kind == "onnx" else [])],
    }
    if scores:
        head["model-index"] = [{"name": name, "results": [_result(score) for score in scores]}]
    steps = lineage_of(source) if source else {}
    lines = ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(), "---", "", f"# {name}", ""]
    lines += [
        "A CLIP that modeclip has exported: it encodes images and texts as vectors whose cosine compares them.",
        "",
    ]
    lines += ["## Use", "", "```python", usage.strip(), "```", "", *rows, ""]
    lines += ["## Data and lineage", ""]
    if not steps:
        lines += ["Not recorded beside the model.", ""]
    for title, facts in steps.items():
        lines += [f"{title}:", "", *(f"- {key}: {value}" for key, value in facts), ""]
    lines += ["## Results", ""]
    if scores:
        lines += ["| held-out task | metric | value | images |", "|---|---|---|---|"]
        lines += [f"| {s.task} | {s.metric} | {100 * s.value:.1f} % | {s.num_images:,} |" for s in scores]
    else:
        lines += ["Not measured (`modeclip export --tasks TASKS.lance` measures them)."]
    lines += ["", "## Licence", ""]
    unknown = "The licence of the weights is not stated; that of the data decides it too."
    lines += [unknown if license in ("unknown", "other") else f"{license}; see that of the data too.", ""]
    (folder / CARD_FILE).write_text("\n".join(lines), encoding="utf-8")


def lineage_of(source: Path) -> dict[str, list[tuple[str, str]]]:
    """Return what a model or a bundle was made from, by step; empty if no file beside it tells."""
    found: dict[str, list[tuple[str, str]]] = {}
    for folder in (source, source.parent):
        for file, title in {MANIFEST_FILE: "Bundle", **_RECORDS}.items():
            if title in found or not (folder / file).is_file():
                continue
            try:
                content = read_json(folder / file, dict[str, Any], "")
            except (DamagedError, ModeclipError):  # a file that is damaged tells nothing
                continue
            if facts := _facts({key: value for key, value in content.items() if key not in ("sha256", "files")}):
                found[title] = facts[:_MOST_FACTS]
    return found


def _facts(content: Mapping[str, Any], start: str = "") -> list[tuple[str, str]]:
    """Return the short values of a record, each by its name; those of objects in it follow, by a dotted name."""
    plain, inner = [], []
    for key, value in content.items():
        if isinstance(value, dict):
            inner += _facts(value, f"{start}{key}.")
        elif isinstance(value, list):
            if value and all(isinstance(item, str | int | float) for item in value) and len(value) <= 12:
                plain.append((f"{start}{key}", ", ".join(_word(item) for item in value)))
        elif value not in (None, ""):
            plain.append((f"{start}{key}", _word(value)))
    return plain + inner


def _word(value: object) -> str:
    """Return a value as text in one line, without the folders around a file."""
    text = " ".join(_PLACES.sub(lambda found: PurePosixPath(found[0]).name, str(value)).split())
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}..."


def _result(score: Score) -> dict[str, Any]:
    return {
        "task": {"type": "zero-shot-image-classification"},
        "dataset": {"name": score.task, "type": score.task},
        "metrics": [{"type": score.metric, "value": round(score.value, 4)}],
    }
