"""The run that another starts from: its vocabulary, and the vectors that its model read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.core.manifest import MANIFEST, checked, read_manifest
from ehr_embed.data.vocabulary import Vocabulary, vocabulary_sha256
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.table import load_table
from ehr_embed.run_folder.checkpoints import read_checkpoint
from ehr_embed.run_folder.layout import TABLE, VOCABULARY


@dataclass(frozen=True, eq=False)
class Origin:
    """The parts of a run that say what its model has learned to read.

    Attributes:
        vocabulary: of its training.
        identity: digests of its embedder and vocabulary.
        texts: (V, E) vectors of its tokens' texts.
        vectors: (V, E) vectors of its tokens as trained, the same where they are frozen.
        trainable: how they were trained.
        pooled: code -> code as which it is read, and gate, of a run on pooled datasets; None = codes are read as themselves.
        has_twins: as of `configured_twins`.
    """

    vocabulary: Vocabulary
    identity: dict[str, str]
    texts: Tensor
    vectors: Tensor
    trainable: str
    pooled: dict[str, tuple[str, float]] | None = None
    has_twins: bool = True


def is_of_other_data(where: str | Path, source: dict[str, Any]) -> bool:
    """Return whether the manifest of a finished run says that no file of `source`, the fingerprints of a dataset, was its own.

    Without a manifest nothing is known, and False is returned.
    """
    folder = Path(where).expanduser()
    path = (folder if folder.is_dir() else folder.parent) / MANIFEST
    if not path.is_file():
        return False
    theirs = read_manifest(path, "Restore the run's folder, or train again").get("made_from", {}).get("source")
    if not isinstance(theirs, dict) or not theirs:
        return False
    data = {str(value) for name, value in theirs.items() if not name.startswith("metadata/")}
    return not data & {str(value) for name, value in source.items() if not name.startswith("metadata/")}


def has_vocabulary(where: str | Path) -> bool:
    """Return whether `where` is a run's folder with its vocabulary, in contrast to a lone checkpoint."""
    return vocabulary_sha256(Path(where).expanduser() / VOCABULARY) is not None


def read_origin(where: str | Path) -> Origin:
    """Read what a run's folder says of the codes that its model reads.

    Raises:
        UserError: there is no vocabulary or no checkpoint in the folder, or they do not belong together.
    """
    folder = Path(where).expanduser()
    path, checkpoint = read_checkpoint(folder)
    identity: dict[str, str] = checkpoint["identity"]
    is_pooled = bool(checkpoint.get("is_pooled"))
    if checkpoint.get("alignment") is not None and not is_pooled:
        raise UserError(
            f"{path} reads its dataset's codes as those of the run that it started from, and a third dataset cannot be aligned "
            "with it. Type: init_from= that run, or data.aligned_to=none"
        )
    if (found := vocabulary_sha256(folder / VOCABULARY)) != identity["vocab_sha256"]:
        raise UserError(
            f"{folder / VOCABULARY}: expected the vocabulary with which {path.name} was trained (sha256 "
            f"{identity['vocab_sha256'][:12]}), found {'none' if found is None else found[:12]}. Codes are aligned with those of "
            "the run, so its whole folder is needed. Type: init_from=RUN_DIR, or data.aligned_to=none"
        )
    for file in (folder / VOCABULARY).iterdir():
        checked(file)
    texts, _ = load_table(folder / VOCABULARY / TABLE, expected=identity)
    embedding = EventEmbedding(texts, trainable := str(checkpoint["config"]["embedder"].get("trainable", "frozen")))
    embedding.load_state_dict(checkpoint.get("embedding_state_dict", {}))
    vectors, pooled = embedding.table.detach(), checked_matches(checkpoint["alignment"], path) if is_pooled else None
    return Origin(Vocabulary.load(folder / VOCABULARY), identity, texts, vectors, trainable, pooled,
                  configured_twins(checkpoint["config"]))  # fmt: skip


def configured_twins(config: Mapping[str, Any]) -> bool:
    """Return whether a run is configured to let several of its codes take another dataset's events of one code, unless a caller
    says otherwise: runs of earlier versions are not, so that they predict as they did.

    >>> configured_twins({"data": {"alignment_twins": None}}), configured_twins({"data": {}})
    (True, False)
    """
    data = config.get("data", {})
    return "alignment_twins" in data and data["alignment_twins"] is not False


def checked_matches(found: Any, path: Path) -> dict[str, tuple[str, float]] | None:
    """Return the matches of a checkpoint's codes; None where it has none.

    Raises:
        UserError: they are something else than codes with gates.

    >>> checked_matches({"A": ["B", 0.5]}, Path("x.pt"))
    {'A': ('B', 0.5)}
    """
    if found is None:
        return None
    items: list[tuple[Any, Any]] = list(found.items()) if isinstance(found, dict) else [(None, None)]
    matches: dict[str, tuple[str, float]] = {}
    for code, match in items:
        is_pair = isinstance(match, list | tuple) and len(match) == 2 and isinstance(match[0], str)
        if not isinstance(code, str) or not is_pair or not isinstance(match[1], float) or not 0 < match[1] <= 1:
            raise UserError(
                f"{path}: its alignment is no mapping of codes to a code and a gate, which train.py writes. Use another run, or "
                "train it again."
            )
        matches[code] = (match[0], match[1])
    return matches


def checked_twins(found: Any, path: Path) -> dict[str, str]:
    """Return the codes of a checkpoint that take the events of others; earlier versions have none.

    Raises:
        UserError: they are something else than pairs of codes.

    >>> checked_twins({"A": "B"}, Path("x.pt")), checked_twins(None, Path("x.pt"))
    ({'A': 'B'}, {})
    """
    twins = {} if found is None else found
    if not isinstance(twins, dict) or not all(isinstance(x, str) for pair in twins.items() for x in pair):
        raise UserError(
            f"{path}: its twins are no mapping of codes to codes, which train.py writes. Use another run, or train it again."
        )
    return dict(twins)
