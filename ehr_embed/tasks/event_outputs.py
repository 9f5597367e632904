"""The outputs per sample of the tasks that predict events, and the metrics that are computed from these outputs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ehr_embed.core.transfer import kept_on
from ehr_embed.data.vocabulary import FIRST_TOKEN, Vocabulary
from ehr_embed.evaluation.bootstrap import SubjectBootstrap
from ehr_embed.evaluation.metric import Metric
from ehr_embed.evaluation.metrics import summaries
from ehr_embed.models.heads import EventScores
from ehr_embed.tasks.protocol import Outputs

TOP = (1, 5, 10)
N_FAMILIES = 12
PER_FAMILY = ("n", "nll", *(f"top{k}" for k in TOP))
EXTRA = ("time_nll", "value_nll")
EVENT_METRICS = (
    Metric("loss", is_higher_better=False),
    Metric("perplexity", is_higher_better=False),
    *(Metric(f"top{k}_accuracy", is_higher_better=True) for k in TOP),
    Metric("time_loss", is_higher_better=False),
    Metric("value_loss", is_higher_better=False, needs="values"),
)
OTHER = "other"


def code_family(code: str) -> str:
    """Return the vocabulary of a code: the part before the first slash, or the code itself if it has none.

    >>> code_family("ICD10CM//E11.9"), code_family("SNOMED/65363002"), code_family("MEDS_DEATH")
    ('ICD10CM', 'SNOMED', 'MEDS_DEATH')
    """
    return re.split("/", code, maxsplit=1)[0]


@dataclass(frozen=True)
class Families:
    """The most frequent code families of a vocabulary; all other codes belong to the family `other`.

    Attributes:
        names: names of the families.
        of_token: (V,) int64, the index of the family of each token.
    """

    names: tuple[str, ...]
    of_token: Tensor

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Families:
        """Return the `N_FAMILIES` families with the most events in train, and `other`."""
        strings, counts = vocabulary.tokens["str"].to_list(), vocabulary.tokens["count"].to_list()
        n_events: Counter[str] = Counter()
        for string, count in list(zip(strings, counts, strict=True))[FIRST_TOKEN:]:
            n_events[code_family(string)] += count
        names = [name for name, _ in n_events.most_common(N_FAMILIES)]
        index = {name: number for number, name in enumerate(names)}
        of_token = [index.get(code_family(string), len(names)) for string in strings]
        return cls((*names, OTHER), torch.tensor(of_token))

    @property
    def n_outputs(self) -> int:
        return len(self.names) * len(PER_FAMILY) + len(EXTRA)


def sum_by_sample(scores: EventScores, targets_BT: Tensor, families: Families) -> Tensor:
    """Return sums over the target events of each sample, (B, n_outputs) float64.

    The columns are the `PER_FAMILY` sums of each family, then the `EXTRA` sums over all families. Without ranks, as in
    training, the sums are not used and are zeros.

    Args:
        scores: scores of the N target events.
        targets_BT: token ids of the targets, 0 = no target.
        families: code families of the vocabulary.
    """
    n_samples, device = len(targets_BT), targets_BT.device
    result = torch.zeros(n_samples, families.n_outputs, dtype=torch.float64, device=device)
    if scores.rank is None:
        return result
    sample_N, place_N = targets_BT.nonzero(as_tuple=True)
    first_N = kept_on(device, families.of_token)[targets_BT[sample_N, place_N].long()] * len(PER_FAMILY)
    columns = [torch.ones_like(scores.nll), scores.nll, *(scores.rank < k for k in TOP)]
    for offset, column in enumerate(columns):
        result.index_put_((sample_N, first_N + offset), column.detach().double(), accumulate=True)
    extra = len(families.names) * len(PER_FAMILY)
    for offset, nll in enumerate((scores.time_nll, scores.value_nll)):
        if nll is not None:
            place = torch.full_like(sample_N, extra + offset)
            result.index_put_((sample_N, place), nll.detach().double(), accumulate=True)
    return result


def totals(outputs: Outputs) -> dict[str, npt.NDArray[np.float64]]:
    """Return the sums of each sample over all families, name -> (n,)."""
    n_family_columns = outputs.shape[1] - len(EXTRA)
    by_family = outputs[:, :n_family_columns].reshape(len(outputs), -1, len(PER_FAMILY)).sum(axis=1)
    sums = dict(zip(PER_FAMILY, by_family.T, strict=True))
    return sums | dict(zip(EXTRA, outputs[:, n_family_columns:].T, strict=True))


def event_metrics(
    outputs: Outputs, families: Families, *, subject_ids: npt.ArrayLike, n_bootstrap: int, seed: int = 0
) -> dict[str, Any]:
    """Return metrics over all target events of a split, each with a subject-level bootstrap interval.

    `loss` is the mean negative log likelihood of an event's token in nats, and `perplexity` its exponential. An event
    counts as correct in the top k if fewer than k other tokens have the same or a higher score. `time_loss` is the mean
    negative log likelihood of the gap before the event given its token. `value_loss` is that of the event's normalised
    value, its presence included; it exists only if events carry values.

    Args:
        outputs: (n, n_outputs), as `sum_by_sample` returns them.
        families: code families of the vocabulary.
        subject_ids: (n,) subject of each sample.
        n_bootstrap: number of bootstrap replicates; 0 = no intervals.
        seed: seed of the bootstrap.

    Returns:
        Each of `EVENT_METRICS` -> {"value", "low", "high"}; "n" (samples), "n_events", "n_subjects", and "by_family"
        {name: {"n_events", "loss", "perplexity", "top1_accuracy", ...}} as plain numbers.
    """
    bootstrap = SubjectBootstrap.of(subject_ids, n_samples=len(outputs), n_bootstrap=n_bootstrap, seed=seed)
    sums = totals(outputs)
    table = np.column_stack([bootstrap.totals(column) for column in sums.values()])
    replicates = dict(zip(sums, np.concatenate([weights @ table for weights in bootstrap.weights()]).T, strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        metrics = _ratios(replicates) | {"time_loss": replicates["time_nll"] / replicates["n"]}
        if sums["value_nll"].any():
            metrics["value_loss"] = replicates["value_nll"] / replicates["n"]
    by_family = {}
    for number, name in enumerate(families.names):
        own = outputs[:, number * len(PER_FAMILY) : (number + 1) * len(PER_FAMILY)].sum(axis=0)
        if own[0]:
            ratios = _ratios(dict(zip(PER_FAMILY, own, strict=True)))
            by_family[name] = {"n_events": int(own[0])} | {key: float(value) for key, value in ratios.items()}
    facts = {"n": len(outputs), "n_events": int(sums["n"].sum()), "n_subjects": bootstrap.n_subjects}
    return summaries(metrics, 0.95) | facts | {"by_family": by_family}


def _ratios(sums: dict[str, Any]) -> dict[str, Any]:
    loss = sums["nll"] / sums["n"]
    return {"loss": loss, "perplexity": np.exp(loss)} | {f"top{k}_accuracy": sums[f"top{k}"] / sums["n"] for k in TOP}
