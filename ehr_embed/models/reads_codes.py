"""Look up the place, the code, the token and the number of each event of a batch, for models of codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.transfer import reads_freely
from ehr_embed.data.vocabulary import Vocabulary


class ReadsCodes(nn.Module):
    """Mixin: look up the code of each token and the number of its value bin.

    Args:
        has_values: whether batches carry a numeric value with each event.
    """

    bin_of_token: Tensor

    def __init__(self, *, has_values: bool) -> None:
        super().__init__()
        self.has_values = has_values
        self.token_codes: list[str | None] = []
        self.register_buffer("bin_of_token", torch.empty(0), persistent=False)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary of the token ids in coming batches."""
        self.token_codes = vocabulary.token_codes
        self.bin_of_token = torch.from_numpy(vocabulary.token_bins).to(self.bin_of_token.device)

    def tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the token ids, (B, T) int64.

        Raises:
            UserError: the inputs hold event vectors and no token ids.
        """
        if "token_ids" not in inputs:
            raise UserError(
                "this model reads the codes of events, and vectors contain no codes. Give texts or a MEDS dataset to predict on."
            )
        return inputs["token_ids"].long()

    def values(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the numeric value of each event, or else the number of its value bin, (B, T) float32, NaN = none."""
        values_BT = inputs.get("values")
        if values_BT is None:
            values_BT = self.bin_of_token[self.tokens(inputs)]
            if self.has_values:  # the model was fitted to numeric values, which bin numbers must not replace
                values_BT = torch.full_like(values_BT, float("nan"))
        return values_BT


def event_places(inputs: dict[str, Tensor]) -> Tensor:
    """Return the number of the place, b * T + t, of each event, (N,) int64, ascending.

    On a GPU they are the input `places`, where it is given, since counting the events would make the host wait.
    """
    mask_BT = inputs["padding_mask"]
    if "places" in inputs and not reads_freely(mask_BT.device):
        return inputs["places"]
    return mask_BT.flatten().nonzero().squeeze(1)
