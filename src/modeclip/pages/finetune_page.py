"""The page of a fine-tuning: accuracy before and after, the line from the start to the tuned model, and the training.

The held-out part of the own set and the general tasks stand side by side, so that a reader sees what the model gained
and what that cost.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from modeclip.adapting.finetuning import FinetuneResult
from modeclip.pages.charts import draw_curves
from modeclip.pages.html import write_page

PAGE_FILE = "finetune.html"
CHART_SIZE = (1080.0, 320.0)


def write_finetuning(result: FinetuneResult, folder: Path | str) -> Path:
    """Write ``finetune.html`` to a folder and return its path; an existing page is replaced as a whole."""
    alphas = np.array([point.alpha for point in result.curve])
    lines = {"own set": np.array([point.own for point in result.curve])}
    if result.curve[0].general is not None:
        lines["general tasks"] = np.array([point.general for point in result.curve])
    logs = {name: {"samples": alphas, "accuracy": values} for name, values in lines.items()}
    steps, scores = (np.array(column, float) for column in zip(*result.checks, strict=True))
    training = {"own set": {"samples": steps, "accuracy": scores}}
    return write_page(
        Path(folder) / PAGE_FILE,
        "finetune.html",
        result=result,
        line=draw_curves(logs, "accuracy", result.alpha, size=CHART_SIZE, right=110.0),
        training=draw_curves(training, "accuracy", float(result.best_step), size=CHART_SIZE, right=20.0),
    )
