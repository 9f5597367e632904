"""Zero-shot risk: the share of a pretrained decoder's sampled futures in which an event of a set occurs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import Count, DrawSeed, checked
from ehr_embed.core.transfer import kept_on
from ehr_embed.data.batches import Batch
from ehr_embed.data.event_set import EventSet
from ehr_embed.data.store import EventStore
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.sampling import HorizonDays, Sampling, Temperature, TopK, TopP, check_lengths, generate
from ehr_embed.tasks.classification import Classification, check_boolean
from ehr_embed.tasks.protocol import Outputs, StepResult

log = logging.getLogger(__name__)
WORRYING_CUT_SHARE = 0.1


class ZeroShot(Classification):
    """Estimates the risk of a boolean label from sampled futures, without training.

    The label must mean that an event of a set occurs within a horizon after the prediction time. The risk is the share
    of futures that hold such an event.

    Args:
        codes, code_pattern, text_pattern: the event set; see `EventSet`.
        definition: YAML file that holds these three keys instead.
        n_samples: number of futures per prediction time; a risk is a multiple of 1 / n_samples.
        horizon_days: length of a future, in days: the horizon of the label.
        max_new_events: largest number of events per future.
        temperature: temperature of the token's distribution.
        top_k, top_p: restrict the draw to the most probable tokens; see `Sampling`.
        stop_codes: a future ends with the first of these codes.
        sampling_seed: seed of the futures.
        options: options of `Classification`, such as `labels` and `monitor`.
    """

    is_trained = False
    needs_causal = True

    @checked("task")
    def __init__(
        self,
        *,
        codes: Sequence[str] = (),
        code_pattern: str | None = None,
        text_pattern: str | None = None,
        definition: str | None = None,
        n_samples: Count = 20,
        horizon_days: HorizonDays = 365.0,
        max_new_events: Count = 64,
        temperature: Temperature = 1.0,
        top_k: TopK = None,
        top_p: TopP = None,
        stop_codes: Sequence[str] = (),
        sampling_seed: DrawSeed = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._event_set = EventSet.given(
            "zero_shot",
            codes=codes,
            code_pattern=code_pattern,
            text_pattern=text_pattern,
            definition=definition,
        )
        self._sampling = Sampling(
            n_samples=n_samples,
            horizon_days=horizon_days,
            max_new_events=max_new_events,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        self._stop, self._seed = EventSet(codes=stop_codes), sampling_seed

    @property
    def n_outputs(self) -> int:
        return super().n_outputs + 1

    @property
    def sizes(self) -> dict[str, int]:
        return {"vocab_size": self._vocab_size}

    def setup(self, store: EventStore, labels_dir: Path, max_length: int) -> None:
        n_prompt = max_length - self._sampling.max_new_events
        check_lengths(n_prompt, self._sampling.max_new_events, max_length)
        super().setup(store, labels_dir, n_prompt)
        check_boolean(self, "zero_shot")
        self._vocab_size = len(store.vocabulary)
        tokens = self._event_set.tokens(store.vocabulary)
        if not tokens:
            raise UserError(
                f"no token of the vocabulary is in {self._event_set}, so every risk would be 0. Check vocab.csv."
            )
        self._tokens = torch.tensor(tokens)
        # Events after the first one of the set do not change the risk.
        stops = {*self._stop.tokens(store.vocabulary), *tokens}
        self._sampling = replace(self._sampling, stop_tokens=tuple(sorted(stops)))

    def step(self, model: nn.Module, embedding: EventEmbedding, batch: Batch) -> StepResult:
        """Return the cross-entropy of the risks, and as outputs the class probabilities and the share of cut futures.

        A future is cut if it ends at `max_new_events`, before its horizon.

        For the cross-entropy, half a future with the event and half a future without are added, so that no risk is 0 or
        1.
        """
        # The seed depends on the batch's first sample, so that a batch gives the same futures whatever came before.
        generator = torch.Generator(batch.token_ids.device).manual_seed(self._seed * 1_000_003 + int(batch.sample[0]))
        futures = generate(model, embedding, batch, self._sampling, generator)
        occurs = torch.isin(futures.token_ids, kept_on(futures.token_ids.device, self._tokens))
        n_samples = self._sampling.n_samples
        has_event = torch.zeros(len(batch.labels), n_samples, dtype=torch.float64, device=occurs.device)
        has_event[futures.prompt[occurs], futures.sample[occurs]] = 1
        risk_B = has_event.mean(1)
        smoothed_B = (has_event.sum(1) + 0.5) / (n_samples + 1)
        loss_B = -torch.where(batch.labels == 1, smoothed_B, 1 - smoothed_B).log()
        outputs = torch.stack([1 - risk_B, risk_B, futures.is_cut.double().mean(1)], dim=-1)
        return StepResult(loss_B.sum(), len(loss_B), outputs)

    def evaluate(self, split: str, outputs: Outputs, *, n_bootstrap: int) -> dict[str, Any]:
        """Return the metrics of `Classification` and `cut_share`, the share of futures cut at `max_new_events`.

        A future that is cut before its horizon may miss the event, so the risk is too low.
        """
        cut_share = float(outputs[:, 2].mean())
        if cut_share > WORRYING_CUT_SHARE:
            log.warning(
                "%s: %.0f%% of the futures were cut at task.max_new_events=%d, before their horizon: risks come out too low. "
                "Type: a larger task.max_new_events, with model.max_length above it",
                split,
                100 * cut_share,
                self._sampling.max_new_events,
            )
        return super().evaluate(split, outputs, n_bootstrap=n_bootstrap) | {"cut_share": cut_share}
