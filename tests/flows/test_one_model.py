"""The experiment on one model out of many: its plan can be carried out, and its tables are those of plain loops."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RUNS = Path(__file__).parents[2] / "runs"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    """The script and its report, which import others of their folder."""
    sys.path.insert(0, str(RUNS))
    import one_model
    import one_model_report

    yield one_model, one_model_report
    sys.path.remove(str(RUNS))


def line(cell: str, seed: int, zero_shot: float, recall: float, **more: float) -> dict[str, Any]:
    values = {
        "tasks": {"a": zero_shot - 1, "b": zero_shot + 1},
        "retrieval": {"image_retrieval_recall@1": recall, "text_retrieval_recall@1": recall + 2},
        **dict.fromkeys(
            ("samples", "flops", "seconds", "inference_flops", "ms_per_image", "times_base", "parameters"), 2e6
        ),
        "active_parameters": 1e6,
    }
    return {"cell": cell, "seed": seed, "values": values | more}


def test_every_model_of_the_plan_can_be_asked_for(scripts: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    experiment = scripts[0].Experiment(RUNS / "one_model.yaml", tmp_path)
    bench = scripts[0].Bench(experiment, 3)
    assert len(experiment.cells) == len(experiment.plan["models"]) + len(experiment.plan["ablations"])
    seen = set()
    for name, cell in experiment.cells.items():
        assert hasattr(bench, f"_{cell['kind']}"), name
        others = {cell[key] for key in ("of", "as") if key in cell}
        assert others <= experiment.cells.keys()
        if cell["kind"] == "upcycle":
            config = bench._upcycling(**{key: value for key, value in cell.items() if key not in {"kind", "of"}})
            assert config.seed == 3
            seen.add((config.stages, config.each_from, config.top_k, config.balance_loss, config.num_clusters))
    assert {(3, "base", 2, 0.01, 3), (1, "base", 2, 0.01, 3), (3, "previous", 2, 0.01, 3)} < seen
    assert len(seen) == 8


def test_tables_compare_models_of_the_same_seed(scripts: tuple[ModuleType, ModuleType]) -> None:
    report = scripts[1]
    lines = [line("base", seed, 20 + seed, 10) for seed in range(3)]
    lines += [line("dense, equal cost", seed, 30 + 2 * seed, 20 + seed) for seed in range(2)]
    lines += [line("CLIP-MoE, DMU", seed, 33 + 2 * seed, 15 + seed) for seed in range(3)]
    tables = report.named_tables(lines, report.read_plan())
    scores = dict(row.strip("| ").split(" | ", 1) for row in tables["one-model-scores"].splitlines()[2:])
    assert list(scores) == ["base", "dense, equal cost", "CLIP-MoE, DMU"]
    plain = {name: row.replace("\u00a0", " ").split(" | ") for name, row in scores.items()}
    # 33, 35, 37: standard deviation 2, half width 4.3027 * 2 / sqrt(3); the difference is 3 with both seeds
    assert plain["CLIP-MoE, DMU"][:3] == ["35.0 ± 5.0", "+3.0 ± 0.0", "16.0 ± 2.5"]
    assert plain["CLIP-MoE, DMU"][3] == "-5.0 ± 0.0"
    assert plain["dense, equal cost"][1].strip() == ""
    costs = tables["one-model-costs"].splitlines()
    assert costs[2] == "| base | 2,000 | 0.0 | 2,000,000 | 2.0 | 2000000.000 | 2000000.00 | 2.00 | 1.00 |"
    assert "text to image, R@1: gains 6.0 ± 2.5 points against base" in tables["one-model-verdict"].replace(
        "\u00a0", " "
    )
    assert "loses -5.0 ± 0.0 points against dense, equal cost" in tables["one-model-verdict"].replace("\u00a0", " ")
    assert "no verdict" in report.verdict(lines[:1])
    assert report.tables([], report.read_plan()).count("Not computed yet.") == 3
