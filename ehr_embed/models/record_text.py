"""Converts the token ids of records to word pieces of their texts, without a loop over events."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.transfer import reads_freely
from ehr_embed.data.batches import padded_length
from ehr_embed.data.store import DAYS_PER_YEAR

DAYS_A_MONTH = 30.4375
GAPS = (
    "",
    "1 day later:",
    *(f"{n} days later:" for n in range(2, 60)),
    *(f"{n} months later:" for n in range(2, 24)),
    *(f"{n} years later:" for n in range(2, 121)),
)
"""Text before an event that states the time since the previous event; empty for less than a day."""


def gap_number(days: Tensor) -> Tensor:
    """Return the index in `GAPS` of the time since the previous event, (...) days -> (...) int64.

    >>> [GAPS[i] for i in gap_number(torch.tensor([0.9, 1.0, 59.5, 60.0, 729.0, 731.0, 1e6]))]
    ['', '1 day later:', '59 days later:', '2 months later:', '23 months later:', '2 years later:', '120 years later:']
    """
    months = 58 + (days / DAYS_A_MONTH).round().clamp(2, 23)
    years = 80 + (days / DAYS_PER_YEAR).round().clamp(2, 120)
    return torch.where(days < 60, days.floor(), torch.where(days < 730, months, years)).long()


class RecordText(nn.Module):
    """Writes records as `[CLS] text; text; 3 days later: text; [SEP]` in the word pieces of a tokenizer.

    Args:
        tokenizer: a tokenizer of Hugging Face's transformers.
        max_pieces: longest record in word pieces, special pieces included. A longer record keeps its static events and
            then its most recent events, whole events only; a single text that is longer is cut.
        times: whether to write the time between two events that are a day or more apart.

    Raises:
        UserError: `max_pieces` leaves no room for an event.
    """

    # `texts` holds the pieces of all gaps and texts one after the other; `starts` and `lengths` say where each of them
    # is.
    texts: Tensor
    starts: Tensor
    lengths: Tensor

    def __init__(self, tokenizer: Any, *, max_pieces: int, times: bool) -> None:
        super().__init__()
        self.tokenizer, self.times, self.n_texts = tokenizer, times, 0
        special: list[int] = tokenizer("")["input_ids"]
        n_first = min(1, len(special) - 1) if special else 0
        self.first, self.last = special[:n_first], special[n_first:]
        self.padding = tokenizer.pad_token_id or 0
        self._gaps = self._split(list(GAPS)) if times else []
        self.budget = max_pieces - len(special)
        self._longest_text = self.budget - max((len(pieces) for pieces in self._gaps), default=0)
        if self._longest_text < 1:
            raise UserError(
                f"model.max_pieces={max_pieces} leaves no room for an event: expected 16 word pieces or more."
            )
        for name in ("texts", "starts", "lengths"):
            self.register_buffer(name, torch.empty(0, dtype=torch.long), persistent=False)

    def set_texts(self, texts: list[str]) -> None:
        """Split the texts of all V tokens into word pieces once; the empty text of padding has no pieces."""
        long = self._split([f"{text};" if text else "" for text in texts])
        pieces = [*self._gaps, *(piece[: self._longest_text] for piece in long)]
        self.n_texts, device = len(texts), self.lengths.device
        self._longest_event = max(map(len, self._gaps), default=0) + max(map(len, pieces), default=0)
        self.lengths = torch.tensor([len(piece) for piece in pieces], device=device)
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.texts = torch.tensor([number for piece in pieces for number in piece], device=device)

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return word pieces (B, L) int64 and their mask (B, L) bool, False = padding.

        Args:
            inputs: `token_ids` (B, T), 0 = padding; `is_static` (B, T), without which no event counts as static;
                `gap_days` (B, T), if `times` is set.

        Raises:
            UserError: no vocabulary was set, or an input is missing.
        """
        token_BT = self._tokens(inputs)
        # A unit is a gap or a text: each event has K = 2 units, or one if times are not written. N counts all pieces.
        unit_BTK = (len(self._gaps) + token_BT).unsqueeze(-1)
        if self.times:
            unit_BTK = torch.cat([gap_number(inputs["gap_days"]).unsqueeze(-1), unit_BTK], dim=-1)
        is_kept_BT = self._fitting(self.lengths[unit_BTK].sum(-1), token_BT, inputs.get("is_static"))
        count_BTK = self.lengths[unit_BTK] * is_kept_BT.unsqueeze(-1)
        count_BU, unit_BU = count_BTK.flatten(1), unit_BTK.flatten(1)
        n_B, end_BU = count_BU.sum(1), count_BU.cumsum(1)
        total_B, device = n_B + len(self.first) + len(self.last), n_B.device
        width = padded_length(int(total_B.max()) if reads_freely(device) else self._most_pieces(token_BT.shape[1]))

        # Each column holds a piece of the first unit that ends beyond it.
        column_L = torch.arange(width, device=device) - len(self.first)
        is_text_BL = (column_L >= 0) & (column_L < n_B.unsqueeze(1))
        at_BL = torch.searchsorted(end_BU, column_L.expand(len(n_B), -1).contiguous(), right=True)
        at_BL = at_BL.clamp(max=end_BU.shape[1] - 1)
        within_BL = column_L - (end_BU - count_BU).gather(1, at_BL)
        place_BL = torch.where(is_text_BL, self.starts[unit_BU.gather(1, at_BL)] + within_BL, 0)
        pieces_BL = torch.where(is_text_BL, self.texts[place_BL], self.padding)
        for column, piece in enumerate(self.first):
            pieces_BL[:, column] = piece
        for offset, piece in enumerate(self.last):
            pieces_BL.scatter_(1, (n_B + len(self.first) + offset).unsqueeze(1), piece)
        return pieces_BL, torch.arange(width, device=device) < total_B.unsqueeze(1)

    def _most_pieces(self, n_events: int) -> int:
        """Return the most pieces that a record of `n_events` may have, which the host knows without counting them."""
        return min(self.budget, n_events * self._longest_event) + len(self.first) + len(self.last)

    def _tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        if not self.n_texts:
            raise UserError("the model reads texts and has no vocabulary yet. Call set_vocabulary(vocabulary) first.")
        needed = ["token_ids", *(["gap_days"] if self.times else [])]
        if missing := [name for name in needed if name not in inputs]:
            raise UserError(
                f"the model reads the texts of events and was given no {missing[0]} (B, T); vectors carry no text. Give the "
                "token ids of its vocabulary, or texts to ehr_embed.load(RUN_DIR).predict_proba."
            )
        return inputs["token_ids"].long()

    def _fitting(self, cost_BT: Tensor, token_BT: Tensor, is_static_BT: Tensor | None) -> Tensor:
        """Return which events fit the budget, (B, T): static ones from the first, then timed ones from the last."""
        is_event_BT = token_BT > 0
        is_static_BT = torch.zeros_like(is_event_BT) if is_static_BT is None else is_static_BT & is_event_BT
        static_BT = is_static_BT & ((cost_BT * is_static_BT).cumsum(1) <= self.budget)
        room_B1 = self.budget - (cost_BT * static_BT).sum(1, keepdim=True)
        is_timed_BT = is_event_BT & ~is_static_BT
        from_here_BT = (cost_BT * is_timed_BT).flip(1).cumsum(1).flip(1)
        return static_BT | (is_timed_BT & (from_here_BT <= room_B1))

    def _split(self, texts: list[str]) -> list[list[int]]:
        # A leading blank, because some tokenizers split a word at the start of a text differently.
        split = self.tokenizer([f" {text}" if text else "" for text in texts], add_special_tokens=False)
        pieces: list[list[int]] = split["input_ids"]
        return pieces
