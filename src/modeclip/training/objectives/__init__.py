"""What a training step minimises: one objective a file, chosen by ``train.loss``.

The trainer knows no loss. It asks the objective how a model starts, what else it reads besides pictures and captions,
what its loss of the towers' features is, which limits the model's numbers have and what the log says of them
(`modeclip.training.objectives.objective`). To add an objective, add a file with a subclass of `Objective` and a line to
`OBJECTIVES`. Any other ``train.loss`` is a sum of losses that distil (`modeclip.training.objectives.distillation`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from modeclip.training.objectives.objective import parse_loss

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


def losses_of(loss: str) -> dict[str, float]:
    """Return the losses that ``train.loss`` consists of, with their weights.

    Raises:
        ModeclipError: It is neither the name of an objective nor a sum of losses that distil.
    """
    return {loss: 1.0} if loss in OBJECTIVES else parse_loss(loss)


def make_objective(settings: Settings) -> Objective:
    """Return the objective that the settings of a training name.

    Args:
        settings: A `TrainConfig`, which has checked the name.
    """
    if settings.loss in OBJECTIVES:
        return OBJECTIVES[settings.loss](settings)
    from modeclip.training.objectives.distillation import Distillation

    return Distillation(settings)
