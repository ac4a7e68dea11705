"""What a training step minimises: one objective a file, chosen by ``train.loss``.

The trainer knows no loss. It asks the objective how a model starts, what else it reads besides pictures and captions,
what its loss of the towers' features is, which limits the model's numbers have and what the log says of them
(`modeclip.training.objectives.objective`). To add an objective, add a file with a subclass of `Objective` and a line to
`OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modeclip.training.objectives.objective import Objective, Settings


def _clip(settings: Settings) -> Objective:
    from modeclip.training.objectives.clip import Contrastive

    return Contrastive(settings)


def _siglip(settings: Settings) -> Objective:
    from modeclip.training.objectives.siglip import Sigmoid

    return Sigmoid(settings)


# The imports above wait until an objective is made: settings are checked by these names without importing torch.
OBJECTIVES: dict[str, Callable[[Settings], Objective]] = {"clip": _clip, "siglip": _siglip}
"""The objectives by the name that ``train.loss`` gives."""


def make_objective(settings: Settings) -> Objective:
    """Return the objective that the settings of a training name.

    Args:
        settings: A `TrainConfig`, which has checked the name.
    """
    return OBJECTIVES[settings.loss](settings)
