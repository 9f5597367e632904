"""A model: mean and maximum over the events of a record, then a small network."""

import torch
from torch import Tensor, nn

from ehr_embed.api import EventInput, LogitLinear, check_classifies


class MyModel(nn.Module):
    """Classify a record by the mean and the maximum of its events, whatever their order.

    The first four arguments are given by ehr_embed, the others stand in conf/model/my_model.yaml.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        model_dim: int = 64,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        n_outputs = check_classifies("model=my_model", num_classes, vocab_size)
        self.events = EventInput(embedding_dim=embedding_dim, model_dim=model_dim, has_values=has_values)
        self.hidden = nn.Sequential(nn.Linear(2 * model_dim, model_dim), nn.GELU())
        self.classes = LogitLinear(model_dim, n_outputs)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits (B, num_classes) of records whose `padding_mask` (B, T) is True where there is an event."""
        is_event = inputs["padding_mask"].unsqueeze(-1)  # (B, T, 1)
        x = self.events(inputs)  # (B, T, D)
        mean = (x * is_event).sum(1) / is_event.sum(1).clamp(min=1)
        maximum = x.masked_fill(~is_event, -1e4).amax(1)
        return self.classes(self.hidden(torch.cat([mean, maximum], dim=-1)))
