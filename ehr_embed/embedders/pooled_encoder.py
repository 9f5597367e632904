"""The network behind `SentenceTransformerEmbedder`, in a module of its own: the library takes seconds to import, and a run whose
vectors are in the cache needs none of it."""

from __future__ import annotations

import logging
import signal
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers.utils import logging as transformers_logging

from ehr_embed.core.launchers import end_with_parent


class PooledEncoder(SentenceTransformer):
    """Sentence transformer whose workers, each with GPU memory, end with their parent even if that is killed."""

    @classmethod
    def _multi_process_worker(cls, *arguments: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the parent ends its workers
        end_with_parent()
        super()._multi_process_worker(*arguments)


def pooled_encoder(
    name: str,
    *,
    revision: str | None,
    pooling: str | None,
    dtype: str,
    device: str,
    truncate_dim: int | None,
) -> PooledEncoder:
    """Return a published sentence transformer with frozen weights.

    Args:
        name: folder, or hub id.
        revision, pooling, dtype, truncate_dim: as in `SentenceTransformerEmbedder`.
        device: the device that holds the weights.
    """
    # A bar for weights that take a moment, and where they lie, are nothing that a user waits for.
    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    weights: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    place: dict[str, Any] = {"device": device, "truncate_dim": truncate_dim}
    if pooling is None:
        loaded = PooledEncoder(name, revision=revision, model_kwargs=weights, **place)
    else:
        transformer = Transformer(name, model_kwargs=weights | ({"revision": revision} if revision else {}))
        pooled = Pooling(transformer.get_embedding_dimension(), pooling_mode=pooling)
        loaded = PooledEncoder(modules=[transformer, pooled], **place)
    loaded.eval().requires_grad_(False)
    return loaded
