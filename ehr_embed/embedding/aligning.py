"""Settings of an alignment, and what follows from one: whether it is wanted, the match table, and the vectors of tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import check_setting
from ehr_embed.data.vocabulary import UNKNOWN, Vocabulary
from ehr_embed.embedders.sentence_transformer import SentenceTransformerEmbedder
from ehr_embed.embedding.alignment import SHIPPED_RULES, Matching, Rules
from ehr_embed.embedding.match_table import Alignment, Texts, align, share_of_new
from ehr_embed.embedding.own_pairs import read_pairs
from ehr_embed.embedding.vector_cache import embed_texts

log = logging.getLogger(__name__)
AUTO, NONE = "auto", "none"
ALIGNED_FROM = 0.5
"""Share of events with codes that the run never saw above which `auto` aligns."""


@dataclass(frozen=True, kw_only=True)
class AlignmentSettings:
    """Settings of the alignment of codes that a run never saw with its own.

    Attributes:
        aligned_to: `auto` (where most events have codes that the run never saw), `none`, or the run's folder (always).
        rules: YAML file of the rules by which texts are cleaned; None = those of the package.
        pairs: CSV file of one's own pairs, which override what texts say.
        texts: `own`, or `shuffled`, the control in which each code has another one's text.
        seed: of the shuffling.
        matching: `nearest`, by which several codes may go to one, or `one_to_one`, for the same codes under other names.
        twins: whether codes of the run without a match take the events of a matched one that says the same; None = as the run is
            configured, and runs of earlier versions have none.
        cache: folder in which vectors of texts are kept for later calls; None = nothing is written.

    Raises:
        UserError: a file cannot be read, or `texts` is unknown.
    """

    aligned_to: str = AUTO
    rules: str | None = None
    pairs: str | None = None
    texts: str = "own"
    seed: int = 0
    matching: str = "nearest"
    twins: bool | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        check_setting("data.alignment_texts", self.texts, Texts)
        check_setting("data.alignment_matching", self.matching, Matching)
        if self.aligned_to != NONE:  # read now, before any work, what may be wrong
            self.read()

    def read(self) -> Rules:
        """Return the rules, and refuse pairs that cannot be read."""
        if self.pairs is not None:
            read_pairs(self.pairs)
        return Rules.read(SHIPPED_RULES if self.rules is None else Path(self.rules).expanduser())

    @property
    def cache_dir(self) -> Path | None:
        """Return the folder of the cache; None = nothing is written."""
        return None if self.cache is None else Path(self.cache).expanduser()

    @property
    def is_off(self) -> bool:
        """Return whether nothing is ever aligned."""
        return self.aligned_to == NONE

    def is_wanted(self, share_new: float) -> bool:
        """Return whether to align where this share of the events has codes that the run never saw; say so in the log.

        >>> AlignmentSettings().is_wanted(0.2), AlignmentSettings(aligned_to="none").is_wanted(1.0)
        (False, False)
        """
        if self.aligned_to == AUTO and share_new > ALIGNED_FROM:
            log.info(
                "%.1f%% of the events have codes that the run never saw: its codes stand for them, by text (data.aligned_to=none "
                "leaves them as they are)",
                100 * share_new,
            )
        return self.aligned_to not in (AUTO, NONE) or (self.aligned_to == AUTO and share_new > ALIGNED_FROM)

    def alignment(
        self, run: Vocabulary, vocabulary: Vocabulary, *, has_twins: bool = True, cache_dir: Path | None = None
    ) -> Alignment:
        """Return which codes of a run stand for those of a dataset, and log it.

        Texts are compared by the sentence transformer that comes with the package, whatever vectors the run reads.

        Args:
            run: vocabulary of the run.
            vocabulary: vocabulary that was fitted on the dataset.
            has_twins: whether the run is configured to have twins, which `twins` overrides.
            cache_dir: folder of the cache of text vectors; None = `cache`.

        Raises:
            UserError: as `align`.
        """
        pairs = None if self.pairs is None else read_pairs(self.pairs)
        with bundled(self.cache_dir if cache_dir is None else cache_dir) as embed:
            found = align(
                run,
                vocabulary,
                embed=embed,
                rules=self.read(),
                pairs=pairs,
                texts=self.texts,
                seed=self.seed,
                matching=self.matching,
                has_twins=has_twins if self.twins is None else self.twins,
            )
        found.say()
        if self.twins is None and not has_twins and self.matching == "nearest":
            log.info(
                "codes of the run without a match get no events, even if they say the same as a matched one, since the run is of "
                "an earlier version or was trained with data.alignment_twins=false; data.alignment_twins=true gives them events"
            )
        return found


@contextmanager
def bundled(cache_dir: Path | None) -> Iterator[Callable[[list[str]], npt.NDArray[np.float32]]]:
    """Yield the function by which texts are compared: vectors (n, E) of the sentence transformer that comes with the package.

    Args:
        cache_dir: folder of the cache of text vectors; None = each text is embedded once here, and nothing is kept.
    """
    embedder = SentenceTransformerEmbedder(model="bundled")
    known: dict[str, npt.NDArray[np.float32]] = {}

    def embed(texts: list[str]) -> npt.NDArray[np.float32]:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, embedder.embed(new), strict=True))
        return np.stack([known[text] for text in texts])

    try:
        yield embed if cache_dir is None else lambda texts: embed_texts(embedder, texts, cache_dir=cache_dir)
    finally:
        embedder.close()


def wanted_alignment(
    settings: AlignmentSettings,
    run: Vocabulary,
    vocabulary: Vocabulary,
    *,
    has_twins: bool = True,
    cache_dir: Path | None = None,
) -> Alignment | None:
    """Return the alignment of a dataset with a run; None where the settings want none."""
    if settings.is_off or not settings.is_wanted(share_of_new(run, vocabulary)):
        return None
    return settings.alignment(run, vocabulary, has_twins=has_twins, cache_dir=cache_dir)


def aligned_table(
    alignment: Alignment, run: Vocabulary, vocabulary: Vocabulary, theirs: Tensor, own: Tensor | None
) -> Tensor:
    """Return the vector of each token of a dataset, (V, E): that of the run's token that stands for it, as far as the gate says,
    and else the token's own.

    Args:
        alignment: of the dataset with the run.
        run: vocabulary of the run.
        vocabulary: vocabulary of the dataset.
        theirs: (V_run, E) the run's vectors.
        own: (V, E) vectors of the dataset's tokens; None = there are none, and the unknown event's is used.

    Raises:
        UserError: the vectors have other widths.
    """
    rows, gates = alignment.rows(run, vocabulary)
    if own is None:
        own = theirs[UNKNOWN].expand(len(vocabulary), -1)
    if own.shape[1] != theirs.shape[1]:
        raise UserError(
            f"the run's vectors are {theirs.shape[1]} wide and this dataset's {own.shape[1]}: another embedder made them. Set "
            "embedder as the run has it."
        )
    gate_V1 = torch.from_numpy(gates).float().unsqueeze(1)
    return gate_V1 * theirs[torch.from_numpy(rows)].cpu() + (1 - gate_V1) * own.cpu()
