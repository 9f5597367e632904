"""Embed texts with any sentence-transformers model: bundled, in a local folder, or from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import digest, file_sha256
from ehr_embed.core.pretrained_weights import is_snapshot, load_pretrained, local_folder
from ehr_embed.core.settings import Count, OneOf, Told, checked
from ehr_embed.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from ehr_embed.embedders.pooled_encoder import PooledEncoder

KEY = "embedder.model"
POOLINGS = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
DTYPES = ("float32", "bfloat16", "float16")
CPU_BATCH, GPU_BATCH = 32, 128
BATCHES_A_CALL = 4
"""Batches per device in one call of `embed`: a device that is done with a batch takes the next one of the call."""


class SentenceTransformerEmbedder:
    """Embedder with frozen weights; they are loaded when a text is not in the cache of vectors.

    Args:
        model: `bundled` (all-MiniLM-L6-v2 from the installed package), a local folder, or a hub id.
        revision: commit, branch or tag on the hub; None = the downloaded copy, or the newest commit if there is none.
        prompt: prefix of every text, as the model's authors prescribe; None = no prefix.
        pooling: one of `POOLINGS`, to pool the vectors of a text's tokens; None = the model's own pooling.
        normalize: whether to scale vectors to a norm of one.
        truncate_dim: number of first dimensions to keep (Matryoshka models, arXiv:2205.13147); None = all.
        embedding_dim: width that the user expects, compared with the model's; None = the model's width.
        batch_size: texts per batch on each device; None = 128 on a GPU and 32 on a CPU. A call of `embed` takes four
            batches per device.
        device: `auto` (all GPUs, else the CPU), one device, or a list of devices.
        dtype: dtype of the weights: float32, bfloat16 or float16.

    Raises:
        UserError: pooling or dtype is unknown, the folder or the weights are missing, or the bundled model is damaged.
    """

    reads_text = True

    @checked("embedder")
    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        prompt: str | None = None,
        pooling: Annotated[str, OneOf(*POOLINGS), Told(remedy="null takes the model's own.")] | None = None,
        normalize: bool = True,
        truncate_dim: Count | None = None,
        embedding_dim: int | None = None,
        batch_size: Count | None = None,
        device: str | list[str] = "auto",
        dtype: Annotated[str, OneOf(*DTYPES)] = "float32",
    ) -> None:
        self.model, self.revision = model, revision
        self.prompt, self.pooling, self.normalize = prompt, pooling, normalize
        self.truncate_dim, self.expected_dim = truncate_dim, embedding_dim
        self.dtype, self.devices = dtype, _devices(device)
        self._batch_size = batch_size or (CPU_BATCH if self.devices[0].startswith("cpu") else GPU_BATCH)
        self.batch_size = self._batch_size * BATCHES_A_CALL * len(self.devices)
        self._pool: dict[Any, Any] | None = None

    @cached_property
    def folder(self) -> Path | None:
        """Return the model's local folder; None for a hub id that has not been downloaded yet."""
        return local_folder(self.model, self.revision, key=KEY)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        # A hub snapshot is identified by its commit, any other folder by the digest of its files.
        folder = self.folder
        if folder is None:
            _ = self._loaded
            del self.folder
            folder = self.folder
        if folder is None or is_snapshot(folder):
            weights: Any = [self.model, folder.name if folder else self.revision]
        else:
            files = sorted(
                path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin", ".json", ".txt")
            )
            weights = digest([(str(path.relative_to(folder)), file_sha256(path)) for path in files])
        return {
            "class": "SentenceTransformerEmbedder",
            "weights": weights,
            "prompt": self.prompt,
            "pooling": self.pooling,
            "normalize": self.normalize,
            "truncate_dim": self.truncate_dim,
            "embedding_dim": self.expected_dim,
            "dtype": self.dtype,
        }

    @cached_property
    def embedding_dim(self) -> int:
        width = self._loaded.get_embedding_dimension()
        if width is None:
            raise UserError(f"embedder.model={self.model} does not say how wide its vectors are: not a text embedder.")
        width = min(width, self.truncate_dim or width)
        if self.expected_dim not in (None, width):
            raise UserError(
                f"embedder.embedding_dim={self.expected_dim}, but {self.model} gives vectors of width {width}. "
                "Leave embedding_dim out: it is read from the model."
            )
        return width

    def names(self, vocabulary: Vocabulary) -> list[str]:
        return vocabulary.texts

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        _ = self.embedding_dim  # refuses a width other than the model's before any text is embedded
        # Starting the processes takes seconds, which texts that fit in one batch are not worth.
        if len(self.devices) > 1 and self._pool is None and len(texts) > self._batch_size:
            self._pool = self._loaded.start_multi_process_pool(self.devices)
        with self._dead_processes_named():
            vectors = self._loaded.encode(
                list(texts),
                prompt=self.prompt,
                batch_size=self._batch_size,
                normalize_embeddings=self.normalize,
                show_progress_bar=False,
                pool=self._pool,
                chunk_size=self._batch_size if self._pool else None,
            )
        return np.asarray(vectors, np.float32)

    def close(self) -> None:
        if self._pool is not None:
            self._loaded.stop_multi_process_pool(self._pool)
            self._pool = None

    @contextmanager
    def _dead_processes_named(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:  # the last two occur if it ended while it sent its vectors
            dead = [process for process in (self._pool or {}).get("processes", ()) if not process.is_alive()]
            if not dead:
                raise
            codes = ", ".join(str(process.exitcode) for process in dead)
            raise UserError(
                f"{len(dead)} of {len(self.devices)} processes that embed on {', '.join(self.devices)} ended (exit code {codes}; "
                "-9: the system killed the process, usually because memory ran out). The vectors that were embedded "
                "before are kept. Type the same command "
                "again, or with a smaller embedder.batch_size, or with embedder.device=" + self.devices[0]
            ) from error

    @cached_property
    def _loaded(self) -> PooledEncoder:
        return load_pretrained(self._load, self.model, self.revision, key=KEY, offline="embedder=minilm_l6")

    def _load(self, name: str, revision: str | None = None) -> PooledEncoder:
        from ehr_embed.embedders.pooled_encoder import (
            pooled_encoder,  # takes seconds, and cached vectors need none of it
        )

        return pooled_encoder(
            name,
            revision=revision,
            pooling=self.pooling,
            dtype=self.dtype,
            device=self.devices[0],
            truncate_dim=self.truncate_dim,
        )


def _devices(device: str | list[str]) -> list[str]:
    """Return the devices that embed; `auto` is every CUDA GPU, else Apple's GPU, else the CPU.

    Raises:
        UserError: torch does not know a device, or does not find it here.
    """
    if device != "auto":
        chosen = [device] if isinstance(device, str) else list(device)
        for name in chosen:
            _check_device(name)
        return chosen
    if torch.cuda.is_available():
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["mps" if torch.backends.mps.is_available() else "cpu"]


def _check_device(name: str) -> None:
    """Refuse a device that is not there now, and not by a traceback for every batch."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"embedder.device={name}: expected auto, cpu, cuda or a list such as [cuda:0,cuda:1]."
        ) from error
    n_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise UserError(f"embedder.device={name}: torch finds {n_gpus} GPUs here. Type: embedder.device=auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"embedder.device={name}: torch finds no Apple GPU here. Type: embedder.device=auto")
