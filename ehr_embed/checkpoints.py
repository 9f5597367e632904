"""Reading checkpoints, and starting a model from one."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ehr_embed.errors import UserError
from ehr_embed.event_embedding import EventEmbedding
from ehr_embed.optimizer import body_of

log = logging.getLogger(__name__)
BEST = "best_checkpoint.pt"
SHAPELESS = ("_target_", "n_heads", "positions")
"""Keys of a model that change what its weights mean and no tensor's shape."""


def read_checkpoint(where: str | Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a run (its best one) or of a file, and its path.

    Raises:
        UserError: there is none, or the file is not a checkpoint of this package.
    """
    path = Path(where).expanduser()
    path = path / BEST if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"init_from={where}: expected a run's folder with {BEST} inside, or a checkpoint file; found none."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({first_line}). Train it again, or use another.") from error
    expected = {"model_state_dict", "config", "identity", "sizes", "class_names"}
    if not isinstance(checkpoint, dict) or not expected <= set(checkpoint):
        raise UserError(
            f"{path}: expected a checkpoint with {', '.join(sorted(expected))}. Use one that train.py wrote."
        )
    return path, checkpoint


def initialise(
    model: nn.Module,
    embedding: EventEmbedding,
    where: str | Path,
    *,
    config: dict[str, Any],
    identity: dict[str, str],
    whole: bool,
) -> None:
    """Start `model` from a checkpoint: its body, or with `whole` all of it. Says what is new and what was left out.

    A checkpoint whose token vectors were learned gives them to `embedding`; after a frozen table, whatever this run does
    with its own starts at the texts' vectors.

    Args:
        where: a run's folder or a checkpoint file.
        config: this run's configuration, to say what differs.
        identity: digests of this run's embedder and vocabulary.
        whole: load the head too, for a task that does not train it.

    Raises:
        UserError: a model without a body to start, another embedder, other names or shapes, token vectors that were learned for
            another vocabulary or that this run would treat otherwise, or with `whole` a head that belongs to another vocabulary.
    """
    if not whole:
        body_of(model)
    path, checkpoint = read_checkpoint(where)
    theirs, ours = checkpoint["identity"]["embedder"], identity["embedder"]
    if theirs != ours:
        raise UserError(
            f"{path} was trained on vectors of {_embedder(checkpoint['config'])} (digest {theirs}), this run embeds with "
            f"{_embedder(config)} (digest {ours}): its weights would read another language. Use the same embedder options."
        )
    saved, own = checkpoint["model_state_dict"], model.state_dict()
    wanted = {name for name in own if whole or name.startswith("body.")}
    given = {name for name in saved if whole or name.startswith("body.")}
    _refuse_mismatch(path, {n: saved[n] for n in given}, {n: own[n] for n in wanted}, checkpoint["config"], config)
    has_token_vectors = any(name.startswith("head.tokens.") for name in given)
    if whole and has_token_vectors and checkpoint["identity"]["vocab_sha256"] != identity["vocab_sha256"]:
        raise UserError(
            f"{path} has a vector for each token of another vocabulary ({checkpoint['identity']['vocab_sha256'][:12]}, here "
            f"{identity['vocab_sha256'][:12]}). Use its data, or a model pretrained with model.vocabulary_head=text_tied."
        )
    if learned := checkpoint.get("embedding_state_dict"):
        _refuse_vectors(path, checkpoint, embedding, identity)
        embedding.load_state_dict(learned)
    model.load_state_dict({name: saved[name] for name in wanted}, strict=whole)
    new, left_out = sorted(set(own) - wanted), sorted(set(saved) - given)
    log.info("init_from %s (epoch %d): %d tensors loaded", path, checkpoint["epoch"], len(wanted))
    log.info("new, to be learned: %s; left out: %s", ", ".join(new) or "nothing", ", ".join(left_out) or "nothing")


def _refuse_vectors(
    path: Path, checkpoint: dict[str, Any], embedding: EventEmbedding, identity: dict[str, str]
) -> None:
    trainable, vocab_sha256 = checkpoint["config"]["embedder"]["trainable"], checkpoint["identity"]["vocab_sha256"]
    if vocab_sha256 != identity["vocab_sha256"]:
        raise UserError(
            f"{path} learned its token vectors (embedder.trainable={trainable}) for another vocabulary ({vocab_sha256[:12]}, "
            f"here {identity['vocab_sha256'][:12]}), and its body reads no others. Use its data, or a model pretrained with "
            "embedder.trainable=frozen: that reads any vocabulary."
        )
    if trainable != embedding.trainable:
        raise UserError(
            f"{path} was trained with embedder.trainable={trainable}, this run has {embedding.trainable}, which has no place "
            f"for its token vectors. Type: embedder.trainable={trainable}; trainer.freeze=body keeps them as they are"
        )


def _refuse_mismatch(
    path: Path, saved: dict[str, Any], own: dict[str, Any], their_config: dict[str, Any], config: dict[str, Any]
) -> None:
    problems = [
        f"{name} is {tuple(saved[name].shape)} there and {tuple(own[name].shape)} here"
        for name in sorted(set(saved) & set(own))
        if saved[name].shape != own[name].shape
    ]
    problems += [f"{name} is only there" for name in sorted(set(saved) - set(own))]
    problems += [f"{name} is only here" for name in sorted(set(own) - set(saved))]
    there, here = their_config["model"], config["model"]
    problems += [
        f"model.{key} is {there.get(key)} there and {here.get(key)} here"
        for key in SHAPELESS
        if there.get(key) != here.get(key)
    ]
    if not problems:
        return
    differ = [f"model.{key}={there.get(key)} there, {here.get(key)} here" for key in {**there, **here}
              if there.get(key) != here.get(key)]  # fmt: skip
    theirs, ours = their_config["data"]["values"], config["data"]["values"]
    differ += [f"data.values={theirs} there, {ours} here"] if theirs != ours else []
    raise UserError(
        f"{path} does not fit this model: {problems[0]}"
        + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
        + f". What differs: {'; '.join(differ) or 'the kind of model'}. Set these as there."
    )


def _embedder(config: dict[str, Any]) -> str:
    own = config["embedder"]
    return str(own.get("model") or str(own["_target_"]).rpartition(".")[2])
