"""Turn a model's logits into the outputs of each label set: a probability, the probabilities of classes, or a number.

The mean and standard deviation of train's numbers are part of the model's state, so that weights from another run keep the scale
on which they were trained.

Suffixes: B samples, M members, C logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ehr_embed.core.settings import OneOf
from ehr_embed.models.members import over_members

LABEL_OUTPUTS = "label_outputs"
"""Key of the `OutputGroup`s among the sizes that a task gives a model, and name of the model's part that holds their scale."""
BINARY, CLASSES, NUMBER = "binary", "classes", "number"
Kind = Annotated[str, OneOf(BINARY, CLASSES, NUMBER)]


@dataclass(frozen=True, kw_only=True)
class OutputGroup:
    """The logits that answer one label set; a checkpoint keeps the group as plain values.

    Attributes:
        name: the label set.
        kind: `binary` (one logit), `classes` (one per class, exclusive) or `number` (one).
        classes: names of the classes, for `classes`.
        mean, sd: of the numbers of train, for `number`; a new model starts from them.
    """

    name: str
    kind: str
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    sd: float = 1.0

    @property
    def width(self) -> int:
        """Return the number of logits."""
        return len(self.classes) if self.kind == CLASSES else 1

    @property
    def names(self) -> list[str]:
        """Return a name per logit.

        >>> OutputGroup(name="stage", kind="classes", classes=("I", "II")).names
        ['stage=I', 'stage=II']
        """
        return [f"{self.name}={own}" for own in self.classes] if self.kind == CLASSES else [self.name]

    @property
    def columns(self) -> list[str]:
        """Return the name of each logit's column in a table of predictions.

        >>> OutputGroup(name="stay", kind="number").columns
        ['predicted_stay']
        """
        return [f"{'predicted' if self.kind == NUMBER else 'probability'}_{name}" for name in self.names]

    def plain(self) -> dict[str, Any]:
        """Return the group as plain values."""
        return asdict(self) | {"classes": list(self.classes)}


class LabelOutputs(nn.Module):
    """Turns logits into predictions, and labels that are numbers into those that the logits of a `number` are compared with.

    Args:
        groups: the label sets in the order of the logits.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, groups: Sequence[OutputGroup]) -> None:
        super().__init__()
        self.groups = list(groups)
        ends = [0, *accumulate(group.width for group in self.groups)]
        self.columns = [slice(start, stop) for start, stop in pairwise(ends)]
        self.register_buffer("mean", torch.tensor([group.mean for group in self.groups], dtype=torch.float64))
        self.register_buffer("sd", torch.tensor([group.sd for group in self.groups], dtype=torch.float64))

    @property
    def names(self) -> list[str]:
        """Return a name per prediction."""
        return [name for group in self.groups for name in group.names]

    def standard(self, labels: Tensor, number: int = 0) -> Tensor:
        """Return labels (B,) of label set `number` in standard deviations of train from its mean, float32."""
        return ((labels.double() - self.mean[number]) / self.sd[number]).float()

    def decode(self, logits: Tensor) -> Tensor:
        """Return predictions (B, C) float64 from logits (B, C), or the mean over members from (B, M, C).

        >>> groups = [OutputGroup(name="dies", kind="binary"), OutputGroup(name="stay", kind="number", mean=3.0, sd=2.0)]
        >>> LabelOutputs(groups).decode(torch.tensor([[0.0, 1.0]])).tolist()
        [[0.5, 5.0]]
        """
        found = []
        for number, (group, own) in enumerate(zip(self.groups, self.columns, strict=True)):
            z = logits[..., own].detach().double()
            if group.kind == BINARY:
                found.append(z.sigmoid())
            elif group.kind == CLASSES:
                found.append(z.softmax(-1))
            else:
                found.append(z * self.sd[number] + self.mean[number])
        return over_members(torch.cat(found, dim=-1))


def with_label_outputs(model: nn.Module, groups: Sequence[dict[str, Any]]) -> nn.Module:
    """Give `model` the meaning of its logits, from the plain values of `OutputGroup`s, and return it."""
    own = [OutputGroup(**(group | {"classes": tuple(group["classes"])})) for group in groups]
    setattr(model, LABEL_OUTPUTS, LabelOutputs(own))
    return model


def label_outputs_of(model: Any) -> LabelOutputs | None:
    """Return the meaning of a model's logits; None for a model whose task gives it no label sets."""
    found = getattr(getattr(model, "module", model), LABEL_OUTPUTS, None)
    return found if isinstance(found, LabelOutputs) else None
