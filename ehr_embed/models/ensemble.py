"""A blend of models that read the same events: one prediction from the weighted mean of their log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
import scipy  # which loads a part when it is first used
import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import OneOf
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.heads import check_classifies
from ehr_embed.models.protocol import (
    AlignsCodes,
    Model,
    PoolsCodes,
    ReadsVocabulary,
    align_codes,
    declarations,
    passes_gradients,
)

Weights = Annotated[str, OneOf("tuning", "equal")]
Floats = npt.NDArray[np.float64]


class Ensemble(nn.Module):
    """Several models as one: the class probabilities are softmax(sum_i w_i log p_i), a logarithmic opinion pool (Genest and
    Zidek 1986, Statistical Science 1:114-135), p_i those of model i.

    The models are trained by themselves; `weights` (N,) sum to 1. For two classes the pool is the mean of the log-odds.

    Args:
        embedding_dim: width of the event vectors; the embedder says it.
        num_classes: outputs; the task says it.
        vocab_size: refused: classes only.
        has_values: whether batches carry a number beside each event; the data say it.
        members: the N models, built with the same sizes.
        max_length: longest sequence, in events, of every member.

    Raises:
        UserError: a task that predicts events, or no member.
    """

    is_causal = False
    takes_twins = True
    weights: Tensor

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        members: list[Model],
        max_length: int,
    ) -> None:
        super().__init__()
        check_classifies("an ensemble", num_classes, vocab_size)
        if not members:
            raise UserError(
                "model.members=[]: an ensemble of nothing predicts nothing. Type: experiment=physionet2012, or "
                "ensemble.runs=[RUN_DIR,RUN_DIR]"
            )
        self.members = nn.ModuleList(members)  # type: ignore[arg-type]
        self.register_buffer("weights", torch.full((len(members),), 1 / len(members), dtype=torch.float64))

    @property
    def reads_vectors(self) -> bool:
        """Return whether any member reads token vectors."""
        return any(declarations(member).reads_vectors for member in self.members)

    @property
    def learns_vectors(self) -> bool:
        """Return whether a gradient reaches the event vectors in every member."""
        return all(passes_gradients(member) for member in self.members)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Tell the members that read codes or texts what the token ids of coming batches mean."""
        for member in self.members:
            if isinstance(member, ReadsVocabulary):
                member.set_vocabulary(vocabulary)

    def align(self, matches: Mapping[str, tuple[str, float]] | None, twins: Mapping[str, str] | None = None) -> None:
        """Read the codes of the present vocabulary as the known ones that `matches` names, in every member.

        Raises:
            UserError: a member cannot, and would read the same events otherwise than the others.
        """
        for member in self.members:
            if isinstance(member, AlignsCodes):
                align_codes(member, matches, twins)
            elif matches is not None:
                raise UserError(
                    f"a member of this ensemble, {type(member).__name__}, does not align codes, and would read the same events "
                    "otherwise than the others. Type: data.aligned_to=none, or predict with the other members' own runs"
                )

    def pool(self, matches: Mapping[str, tuple[str, float]], dataset_of: Mapping[str, int] | None = None) -> None:
        """Read the codes of pooled datasets as those that `matches` names, in every member that can."""
        for member in self.members:
            if isinstance(member, PoolsCodes):
                member.pool(matches, dataset_of)

    def adapt_to_records(self, train: Iterable[dict[str, Tensor]]) -> None:
        """After `align`, give the members another dataset's records; they were fitted to train in their own runs.

        Each member reads `train` by itself. If `train` can be read only once, as a generator can, its batches are kept in memory.
        """
        batches = list(train) if iter(train) is train else train
        for member in self.members:
            if isinstance(member, AlignsCodes):
                member.adapt_to_records(batches)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (B, C) float64, from what `EventEmbedding.inputs` gives."""
        return self.pooled(self.of_members(inputs))

    def of_members(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Return the log-probabilities (B, C) float64 of each member."""
        return [log_probabilities(member(inputs)) for member in self.members]

    def pooled(self, log_p: list[Tensor]) -> Tensor:
        """Return the logits (B, C) of the pool of the members' log-probabilities (B, C)."""
        return torch.stack([weight * own for weight, own in zip(self.weights, log_p, strict=True)]).sum(0)


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the log-probabilities (B, C) float64 of logits (B, C), or of the mean probabilities of M members, (B, M, C).

    >>> log_probabilities(torch.tensor([[[0.0, 0.0], [-1e9, 0.0]]])).exp().tolist()
    [[0.25, 0.75]]
    """
    log_p = logits.double().log_softmax(-1)
    return log_p if log_p.ndim == 2 else log_p.logsumexp(1) - np.log(log_p.shape[1])


def pooled_losses(weights_G: Floats, log_p_GNC: Floats, labels_N: npt.NDArray[np.int64]) -> Floats:
    """Return the cross-entropy (N,) of the pool of log-probabilities (G, N, C) with weights (G,)."""
    z_NC = np.einsum("g,gnc->nc", weights_G, log_p_GNC)
    losses: Floats = scipy.special.logsumexp(z_NC, axis=1) - z_NC[np.arange(len(labels_N)), labels_N]
    return losses


def shared_out(weights_G: Floats, groups: Sequence[int]) -> Floats:
    """Return the weight of each model (A,): that of its group, shared equally among the group's models.

    >>> shared_out(np.array([0.5, 0.5]), [0, 0, 1]).tolist()
    [0.25, 0.25, 0.5]
    """
    of_A = np.asarray(groups)
    weights_A: Floats = weights_G[of_A] / np.bincount(of_A)[of_A]
    return weights_A


def equal_weights(groups: Sequence[int]) -> Floats:
    """Return the weight of each model (A,) where every group counts the same.

    >>> equal_weights([0, 0, 1]).tolist()
    [0.25, 0.25, 0.5]
    """
    n_groups = max(groups) + 1
    return shared_out(np.full(n_groups, 1 / n_groups), groups)


def choose_weights(
    log_p_ANC: Sequence[Floats], labels_N: npt.NDArray[np.int64], groups: Sequence[int]
) -> tuple[Floats, bool]:
    """Return the weight of each of A models, which sum to 1, and whether they differ from equal ones per group.

    Models of one group, such as the seeds of a recipe, share a weight: there are as many numbers to choose as groups, less one.
    They are those with the least cross-entropy, a convex function of them, and are taken only where their losses lie below
    those of equal groups by more than one standard error of the difference: few labels do not tell weights.

    Args:
        log_p_ANC: each model's log-probabilities, (N, C).
        labels_N: classes.
        groups: number of each model's group, from 0.

    >>> rng = np.random.default_rng(0)
    >>> labels = rng.integers(0, 2, 400)
    >>> knows = np.log(np.where(np.eye(2)[labels] > 0, 0.8, 0.2))
    >>> guesses = np.log(rng.dirichlet([1, 1], 400))
    >>> weights, differ = choose_weights([knows, knows, guesses], labels, [0, 0, 1])
    >>> bool(weights[0] == weights[1] > 0.45), bool(weights[2] < 0.1), differ
    (True, True, True)
    >>> choose_weights([knows, knows], labels, [0, 1])[0].tolist()
    [0.5, 0.5]
    """
    of_A = np.asarray(groups)
    n_groups = max(groups) + 1
    stacked_ANC = np.stack(log_p_ANC)
    log_p_GNC = np.stack([stacked_ANC[of_A == g].mean(0) for g in range(n_groups)])
    equal_G = np.full(n_groups, 1 / n_groups)
    chosen_G, differ = equal_G, False
    if n_groups > 1:
        found = scipy.optimize.minimize(
            lambda w: pooled_losses(w, log_p_GNC, labels_N).mean(),
            equal_G,
            bounds=[(0, 1)] * n_groups,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
        )
        best_G = found.x.clip(0, 1) / found.x.clip(0, 1).sum()
        gain_N = pooled_losses(equal_G, log_p_GNC, labels_N) - pooled_losses(best_G, log_p_GNC, labels_N)
        differ = bool(gain_N.mean() > gain_N.std() / len(gain_N) ** 0.5)
        chosen_G = best_G if differ else equal_G
    return shared_out(chosen_G, groups), differ
