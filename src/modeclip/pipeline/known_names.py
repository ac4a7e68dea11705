"""Does an expert for class names pay? The question that a run with ``experts.for_classes`` asks besides its tasks.

Held-out images whose captions hold exactly one of the names are classified among the names, by three ways to train:
the dense model, the expert for the names, and the mixture under its default rule. The expert has cost what the dense
model has; the mixture is left out where it has cost more. The same models' average over the held-out tasks stands
beside it, since such an expert is meant for its names alone.

`modeclip.evaluation.deciding` makes a gain, its interval and a sentence of the answers. A run is one seed, so its
sentence is at most *likely*; `runs/rules_over_seeds.py` puts several runs together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeclip.data.catalog import Catalog
from modeclip.data.tasks.names import CLASS_NAMES, chance_of_names, distinct_names, names_task
from modeclip.data.tasks.task import Task
from modeclip.evaluation.deciding import DENSE, OF_NAMES, Way, average_gains, caution, decide, gains_of, mean_outcome
from modeclip.evaluation.intervals import Outcome, average
from modeclip.evaluation.systems import System, TrainedModel, models_behind
from modeclip.models.deltas import WEIGHTS_FILE
from modeclip.system.console import log

NAMES, MIXTURE = "names", "mixture"
"""The expert for class names, and the mixture, among the ways."""
ALL_NAMES = "all names"
"""What the average over the held-out tasks is called beside `CLASS_NAMES`."""
REMEDY = "more seeds and held-out images tell"
"""What to do where a run cannot tell, as the sentence has it."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """The question, and who answers it."""

    task: Task
    """Classification among the names."""
    systems: Mapping[str, System]
    """Who answers, by the name of the way; `DENSE` is the first."""

    @classmethod
    def of(cls, held: Catalog, names: Sequence[str], expert: str, systems: Sequence[System]) -> Contest | None:
        """Return the contest of a run; None, and a line in the log, where there is none.

        Args:
            held: Catalog of the held-out tasks.
            names: Class names of the expert.
            expert: Its name among the systems.
            systems: All systems of the run.
        """
        own = next(system for system in systems if system.name == expert)
        dense = next((system for system in systems if (system.kind, system.samples) == ("dense", own.samples)), None)
        if dense is None:
            log(f"{expert} is not compared: no dense model of its cost was trained (experts.dense)")
            return None
        rows = np.flatnonzero(held.read(["task"])["task"].astype(str) != "")
        task = names_task(held, rows, distinct_names(names))
        if task is None:
            log(f"{expert} is not compared: no held-out caption holds exactly one of its names as whole words")
            return None
        default = next(system for system in systems if system.is_default)
        mixture = {MIXTURE: default} if (default.samples or 0) <= (dense.samples or 0) else {}
        return cls(task=task, systems={DENSE: dense, NAMES: own, **mixture})

    def ways(self) -> list[Way]:
        """Return the ways in the order of their rows."""
        titles = {
            DENSE: "one dense model",
            NAMES: f"one expert for these {len(self.task.classnames)} names",
            MIXTURE: f"{len(self.systems[MIXTURE].models)} experts on clusters of captions" if self.has_mixture else "",
        }
        return [
            Way(name=name, title=titles[name], towers=float(len(system.models)))
            for name, system in self.systems.items()
        ]

    @property
    def has_mixture(self) -> bool:
        """Whether the mixture has cost no more than the dense model."""
        return MIXTURE in self.systems

    def decision(
        self,
        answers: Mapping[str, Sequence[Outcome]],
        elsewhere: Mapping[str, Sequence[Mapping[str, Outcome]]],
        models: Sequence[TrainedModel],
    ) -> dict[str, Any]:
        """Return what ``results.json`` holds of it: gains, costs, and the sentence.

        Args:
            answers: What each way did on the question, an outcome for each seed.
            elsewhere: What each way did on the held-out tasks, for each seed.
            models: All models of the run, which say what the ways have cost.
        """
        ways, gains = self.ways(), {CLASS_NAMES: gains_of(answers), ALL_NAMES: average_gains(elsewhere)}
        chance = chance_of_names(self.task)
        verdict = decide(ways, gains[CLASS_NAMES], answers[DENSE], chance=chance, measure=OF_NAMES, remedy=REMEDY)
        own = next(way for way in ways if way.name == NAMES)
        rows = []
        for way in ways:
            system = self.systems[way.name]
            scores = {
                CLASS_NAMES: mean_outcome(answers[way.name]).score,
                ALL_NAMES: float(np.mean([average(outcomes) for outcomes in elsewhere[way.name]])),
            }
            rows.append(
                {
                    "name": way.name,
                    "title": way.title,
                    "model": system.name,
                    "gain": {name: asdict(found[way.name]) for name, found in gains.items() if way.name in found},
                    "score": scores,
                    "samples": system.samples,
                    "towers": way.towers,
                    **_cost(system, models),
                }
            )
        return {
            "verdict": asdict(verdict),
            "caution": caution(own, gains[ALL_NAMES][NAMES], verdict.choice),
            "questions": {
                CLASS_NAMES: len(self.task.images),
                ALL_NAMES: sum(len(outcome.hits) for outcome in elsewhere[DENSE][0].values()),
            },
            "classnames": list(self.task.classnames),
            "chance": chance,
            "expert": self.systems[NAMES].name,
            "seeds": len(answers[DENSE]),
            "rows": rows,
        }


def _cost(system: System, models: Sequence[TrainedModel]) -> dict[str, float]:
    """Return the seconds of a system's trainings, the seed's included, and the megabytes of its weights."""
    folders = {Path(ref.spec).resolve() for ref in system.models}
    used = [model for model in models if model.folder in folders]
    return {
        "seconds": round(sum(model.seconds for model in models_behind(used, models)), 1),
        "megabytes": round(sum((folder / WEIGHTS_FILE).stat().st_size for folder in folders) / 1e6, 1),
    }
