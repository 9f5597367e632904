"""Write and read checkpoints, and initialise a model from one."""

from __future__ import annotations

import logging
import pickle
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.core.manifest import checked
from ehr_embed.core.moved import current_state, renamed
from ehr_embed.data.vocabulary import (
    PADDING,
    TOKENS_FILE,
    UNKNOWN,
    Vocabulary,
    read_strings,
    vocabulary_sha256,
)
from ehr_embed.embedders.protocol import trainable_of
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.hazards import HAZARDS, hazard_sizes
from ehr_embed.models.protocol import Declarations, body_of, declarations
from ehr_embed.run_folder.layout import BEST, CONFIG, FINISHED, LATEST, VOCABULARY

log = logging.getLogger(__name__)
DOS_FOLDER = 0x10
"""Bit of a ZIP entry's external attributes (APPNOTE 6.3.10, section 4.4.15; MS-DOS directory)."""


@dataclass
class Continuation:
    """An unfinished run that is resumed.

    Attributes:
        path: path of its latest checkpoint.
        checkpoint: content of that checkpoint.
        is_changed: whether this start has other settings; then the new learning rates and schedule apply from the
            checkpoint's step on.
    """

    path: Path
    checkpoint: dict[str, Any]
    is_changed: bool = False

    @property
    def seconds(self) -> float:
        """Return the seconds that the run had spent when it wrote the checkpoint."""
        progress = self.checkpoint["progress"]
        return float(progress["total_seconds"] + progress["seconds"])


def checkpoint_path(where: str | Path) -> Path:
    """Return the path of the best checkpoint if `where` is a run's folder, else `where` itself."""
    path = Path(where).expanduser()
    return path / BEST if path.is_dir() else path


def read_checkpoint(where: str | Path, *, key: str = "init_from") -> tuple[Path, dict[str, Any]]:
    """Read the best checkpoint of a run's folder, or a checkpoint file, and return its path and content.

    The file is compared with the run's manifest if there is one, which only finished runs have. Its CRC-32 checksums are
    always verified here, since torch does not verify them.

    Args:
        where: a run's folder, or a checkpoint file.
        key: the key by which the user named it, for the message.

    Raises:
        UserError: there is no checkpoint, the file is damaged or differs from the manifest, or another program wrote it.
    """
    path = checkpoint_path(where)
    if not path.is_file():
        if (path.parent / FINISHED).is_file():
            raise UserError(
                f"{key}={where}: this run trained nothing (trainer=evaluate, or a task without training), so it has no {BEST}. "
                "Type the run that its init_from names"
            )
        if Path(where).expanduser().is_dir() and (path.parent / CONFIG).is_file():
            raise UserError(
                f"{key}={where}: the run has not finished its first epoch, so it has no {BEST} yet. Wait until it has, or start it "
                f"again by its own command, with run_dir={where}"
            )
        raise UserError(
            f"{key}={where}: expected a run's folder with {BEST} inside, or a checkpoint file; found none. Give the run_dir of a "
            "finished run"
        )
    checked(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} in it is wrong: the file is damaged")
            # No checksum covers the archive's directory. Torch does not read a record that the directory marks as a folder, and
            # would return a tensor of uninitialised memory.
            if folders := [entry.filename for entry in archive.infolist() if entry.external_attr & DOS_FOLDER]:
                raise zipfile.BadZipFile(f"{folders[0]} in it is said to be a folder: the file is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({first_line}). Train it again, or use another.") from error
    expected = {"model_state_dict", "config", "identity", "sizes", "class_names"}
    if not isinstance(checkpoint, dict) or not expected <= set(checkpoint):
        raise UserError(
            f"{path}: expected a checkpoint with {', '.join(sorted(expected))}. Use one that train.py wrote."
        )
    weights = current_state(checkpoint["model_state_dict"])
    return path, checkpoint | {"config": renamed(checkpoint["config"]), "model_state_dict": weights}


def write_latest(
    run_dir: Path, weights: dict[str, Any], progress: dict[str, Any], rest: dict[str, Any], rng: dict[str, Any]
) -> None:
    """Write `latest_checkpoint.pt`.

    Args:
        run_dir: the run's folder.
        weights: state dict of the model.
        progress: progress of training, such as epoch, batch and step; its `epoch` becomes that of the checkpoint.
        rest: further entries of the checkpoint.
        rng: states of the random generators.
    """
    checkpoint = {
        "model_state_dict": weights,
        **rest,
        "epoch": progress["epoch"],
        "progress": progress,
        "rng_state": rng,
    }
    with atomic_path(run_dir / LATEST) as path:
        torch.save(checkpoint, path)


def initialise(
    model: nn.Module,
    embedding: EventEmbedding,
    where: str | Path,
    *,
    config: dict[str, Any],
    identity: dict[str, str],
    vocabulary: Vocabulary,
    class_names: list[str] | None = None,
    trained_classes: list[str] | None = None,
) -> None:
    """Initialise `model` from a checkpoint: its body, and its head if that answers with the same classes, or with `class_names` all
    its weights. Log what was not loaded.

    If the checkpoint holds learned token vectors, `embedding` receives them. If the vocabularies differ, vectors are matched by
    the tokens' names, and a token without a match gets the vector of the unknown event (trainable=full) or of its own text
    (trainable=residual). If the checkpoint's table was frozen, `embedding` keeps the vectors of the texts.

    Args:
        model: model to initialise.
        embedding: token vectors to initialise.
        where: a run's folder or a checkpoint file.
        config: this run's configuration, from which error messages name the keys that differ.
        identity: digests of this run's embedder and vocabulary.
        vocabulary: this run's vocabulary, with the counts of events in train.
        class_names: classes of this run, if it does not train the head but takes the head of the checkpoint.

    Raises:
        UserError: the model has no body; the embedder, the names or the shapes of the weights differ; this run trains token
            vectors in another way; the vocabulary of learned vectors is not beside the checkpoint; or, with `class_names`, the
            classes differ or the head belongs to another vocabulary.
    """
    whole = class_names is not None
    if not whole:
        body_of(model)
    path, checkpoint = read_checkpoint(where)
    theirs, ours = checkpoint["identity"]["embedder"], identity["embedder"]
    if theirs != ours:
        raise UserError(
            f"{path} was trained on vectors of {_embedder(checkpoint['config'])} (digest {theirs}), this run embeds with "
            f"{_embedder(config)} (digest {ours}): these weights cannot read those vectors. Use the same embedder options."
        )
    if class_names is not None and (there := checkpoint["class_names"]) and there != class_names:
        raise UserError(
            f"{path} predicts {', '.join(there)}, this run's labels are {', '.join(class_names) or 'no classes'}: a head that is "
            "not trained again can only predict its own classes. Set task.labels as in that run, or train the head: trainer=short"
        )
    saved, own = checkpoint["model_state_dict"], model.state_dict()
    keeps_head = (
        not whole and bool(trained_classes) and trained_classes == checkpoint["class_names"] and _same_head(saved, own)
    )
    wanted = {name for name in own if whole or keeps_head or name.startswith("body.")}
    given = {name for name in saved if whole or keeps_head or name.startswith("body.")}
    if whole:
        _refuse_other_hazards(path, checkpoint, model)
    shapes = {n: saved[n] for n in given}, {n: own[n] for n in wanted}
    declared = declarations(model)
    _refuse_mismatch(path, *shapes, checkpoint["config"], config, declared=declared)
    has_token_vectors = any(name.startswith(declared.token_weights) for name in given)
    if has_token_vectors and checkpoint["identity"]["vocab_sha256"] != identity["vocab_sha256"]:
        raise UserError(
            f"{path} has a vector for each token of another vocabulary ({checkpoint['identity']['vocab_sha256'][:12]}, here "
            f"{identity['vocab_sha256'][:12]}). Use its data, or a model pretrained with model.vocabulary_head=text_tied."
        )
    if learned := checkpoint.get("embedding_state_dict"):
        _refuse_other_training(path, checkpoint, embedding)
        if checkpoint["identity"]["vocab_sha256"] == identity["vocab_sha256"]:
            embedding.load_state_dict(learned)
        else:
            names = _names_beside(path, checkpoint)
            vectors = by_name(learned["learned"], names, vocabulary, unknown_as_known=embedding.trainable == "full")
            embedding.load_state_dict({"learned": vectors})
    model.load_state_dict({name: saved[name] for name in wanted}, strict=whole)
    new, left_out = sorted(set(own) - wanted), sorted(set(saved) - given)
    log.info("init_from %s (epoch %d): %d tensors loaded", path, checkpoint["epoch"], len(wanted))
    if keeps_head and trained_classes:
        log.info("the head is kept, since it answers with the same classes: %s", ", ".join(trained_classes))
    log.info("new, to be learned: %s; left out: %s", ", ".join(new) or "nothing", ", ".join(left_out) or "nothing")


def _same_head(saved: dict[str, Any], own: dict[str, Any]) -> bool:
    """Return whether two models have the same tensors outside their bodies."""

    def shapes(state: dict[str, Any]) -> dict[str, Any]:
        return {name: getattr(x, "shape", None) for name, x in state.items() if not name.startswith("body.")}

    return shapes(saved) == shapes(own)


def by_name(learned: Tensor, names: list[str], vocabulary: Vocabulary, *, unknown_as_known: bool) -> Tensor:
    """Return the learned vectors for the tokens of another vocabulary, matched by the tokens' names, and log how many match.

    Args:
        learned: (V, E) learned vectors or offsets.
        names: (V,) names of the tokens for which they were learned.
        vocabulary: the other vocabulary, with V' tokens.
        unknown_as_known: give a token without a match the row of the unknown event instead of zeros.

    Returns:
        (V', E) rows for the tokens of `vocabulary`.
    """
    row_of = {name: row for row, name in enumerate(names)}
    rows = torch.tensor([row_of.get(name, UNKNOWN) for name in vocabulary.strings])
    found = torch.tensor([name in row_of for name in vocabulary.strings])
    counts = torch.from_numpy(vocabulary.tokens["count"].to_numpy().copy())
    n_events = int(counts.sum())
    share = int(counts[found].sum()) / max(n_events, 1)
    what = "the vector of the unknown event" if unknown_as_known else "no learned offset, so their text's vector"
    log.log(
        logging.INFO if share else logging.WARNING,
        "learned vectors matched by name: %d of %d tokens, %.1f%% of train's %d events; the others have %s",
        int(found[UNKNOWN + 1 :].sum()),
        len(vocabulary) - UNKNOWN - 1,
        100 * share,
        n_events,
        what,
    )
    vectors = learned[rows]
    if not unknown_as_known:
        vectors[~found] = 0.0
    vectors[PADDING] = learned[PADDING]
    return vectors


def _names_beside(path: Path, checkpoint: dict[str, Any]) -> list[str]:
    """Return the token names of a checkpoint from the vocabulary in its run's folder."""
    folder, expected = path.parent / VOCABULARY, checkpoint["identity"]["vocab_sha256"]
    if (there := vocabulary_sha256(folder)) != expected:
        found = "none" if there is None else f"one with sha256 {there[:12]}"
        raise UserError(
            f"{path} learned a vector for each token of another vocabulary. To carry them over by name, the one it was trained "
            f"with (sha256 {expected[:12]}) must be beside it as {VOCABULARY}/{TOKENS_FILE}; found {found}. "
            "Type: init_from=RUN_DIR with the run's whole folder"
        )
    return read_strings(folder)


def _refuse_other_training(path: Path, checkpoint: dict[str, Any], embedding: EventEmbedding) -> None:
    trainable = trainable_of(checkpoint["config"]["embedder"])
    if trainable != embedding.trainable:
        raise UserError(
            f"{path} was trained with embedder.trainable={trainable}, this run has {embedding.trainable}, which cannot hold "
            f"its token vectors. Type: embedder.trainable={trainable}; trainer.freeze=body keeps them as they are"
        )


def _refuse_other_hazards(path: Path, checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Refuse other time bins or outcomes for a hazard head that is not trained again: its hazards would be read at times that they
    do not mean, though all shapes may agree.

    Raises:
        UserError: the bins, the width, or the outcomes that have learned vectors differ.
    """
    sizes, saved = hazard_sizes(model), checkpoint["sizes"].get(HAZARDS)
    if sizes is None or saved is None:
        return
    keys = ("edges", "width", "vectors", *(["names"] if sizes.vectors == "learned" else []))
    differ = [
        f"{key} {saved[key]} there, {getattr(sizes, key)} here" for key in keys if saved[key] != getattr(sizes, key)
    ]
    if differ:
        raise UserError(
            f"{path} has a hazard head for other time bins or outcomes: {'; '.join(differ)}. Without training it would be read at "
            f"times that it was not trained for. Train it: trainer.epochs=10, or ask that run, which keeps its own bins: "
            f"python -m ehr_embed.ask run={path.parent} data.root=DIR"
        )


def _refuse_mismatch(
    path: Path,
    saved: dict[str, Any],
    own: dict[str, Any],
    their_config: dict[str, Any],
    config: dict[str, Any],
    *,
    declared: Declarations,
) -> None:
    problems = [
        f"{name} is {tuple(saved[name].shape)} there and {tuple(own[name].shape)} here"
        for name in sorted(set(saved) & set(own))
        if isinstance(saved[name], Tensor)
        and saved[name].shape != own[name].shape  # entries that are no tensors are the extra state of an estimator
    ]
    problems += [f"{name} is only there" for name in sorted(set(saved) - set(own))]
    problems += [f"{name} is only here" for name in sorted(set(own) - set(saved))]
    there, here = their_config["model"], config["model"]
    problems += [
        f"model.{key} is {there.get(key)} there and {here.get(key)} here"
        for key in ("_target_", *declared.meaning_keys)
        if there.get(key) != here.get(key)
    ]
    theirs, ours = their_config["data"]["values"], config["data"]["values"]
    if theirs != ours and declared.reads_values:
        problems.append(f"data.values is {theirs} there and {ours} here")
    if not problems:
        return
    differ = [f"model.{key}={there.get(key)} there, {here.get(key)} here" for key in {**there, **here}
              if there.get(key) != here.get(key)]  # fmt: skip
    differ += [f"data.values={theirs} there, {ours} here"] if theirs != ours else []
    raise UserError(
        f"{path} does not fit this model: {problems[0]}"
        + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
        + f". What differs: {'; '.join(differ) or 'the kind of model'}. Give these keys the values of that run."
    )


def _embedder(config: dict[str, Any]) -> str:
    own = config["embedder"]
    return str(own.get("model") or str(own["_target_"]).rpartition(".")[2])
