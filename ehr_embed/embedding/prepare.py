"""Prepare the event store and the embedding table of a source and an embedder; build them only if they are missing."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ehr_embed.core.files import digest, file_sha256, locked, remove_leftovers
from ehr_embed.core.fingerprints import known_fingerprints
from ehr_embed.core.lost_data import ONLY_SAID, say_or_refuse
from ehr_embed.data.store import EventStore, build_store, check_fingerprint, store_folder
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedders.protocol import Embedder
from ehr_embed.embedding.table import build_table, load_table, save_table
from ehr_embed.sources.code_texts import STEPS
from ehr_embed.sources.protocol import SPLITS, Source

log = logging.getLogger(__name__)
ORIGINS = dict(
    zip(STEPS, ("terms of a lookup", "descriptions", "descriptions of parents", "codes in words"), strict=True)
)
"""The name of each origin of a text in the log."""


@dataclass(frozen=True)
class Prepared:
    """The data that training reads.

    Attributes:
        store: events and vocabulary.
        table: (V, E) vectors of the tokens' texts.
        table_path: file of the table.
        table_digest: digest of the table's file, which changes with the texts or the embedder.
        identity: digests of the embedder and the vocabulary, on which trained weights depend.
        embedding_seconds: seconds spent on building the table; 0 if it existed.
        is_new: whether the store was built now, and its texts and sizes were told.
    """

    store: EventStore
    table: Tensor
    table_path: Path
    table_digest: str
    identity: dict[str, str]
    embedding_seconds: float
    is_new: bool = False


def prepare(
    source: Source,
    settings: VocabularySettings,
    embedder: Embedder,
    *,
    cache_dir: Path,
    min_text_coverage: float = 0.8,
    overwrite: bool = False,
    integrity: str = "auto",
) -> Prepared:
    """Open the store and the table, and build them if missing; one process at a time builds, others wait for it.

    Args:
        source: the source of the events.
        settings: the settings of the vocabulary.
        embedder: the embedder of the tokens' texts.
        cache_dir: folder of the cache, in which store and table lie.
        min_text_coverage: share of train events with a real text below which a warning is logged.
        overwrite: whether to build store and table again.
        integrity: how the files are compared with the manifest, see `ehr_embed.core.manifest`.

    Raises:
        UserError: the store was built from other data and `overwrite` is False, or building or opening failed.
    """
    folder = store_folder(cache_dir, source, settings)
    with locked(folder.with_suffix(".lock"), f"building {folder}"), known_fingerprints(cache_dir):
        remove_leftovers(folder.parent, f"{folder.name}.")
        remove_leftovers(folder)
        is_new = overwrite or not (folder / "manifest.json").exists()
        if is_new:
            log.info("building the event store %s", folder)
            store = build_store(folder, source, settings)
            report(store, min_text_coverage)
        else:
            store = EventStore(folder, integrity=integrity)
            check_fingerprint(store, source)
        vocabulary = store.vocabulary
        about = {
            "vocab_sha256": store.manifest["vocab_sha256"],
            "embedder": digest(embedder.fingerprint),
        }
        path = folder / f"table-{about['embedder']}.safetensors"
        began, is_there = time.perf_counter(), path.exists() and not overwrite
        if not is_there:
            names = embedder.names(vocabulary)
            # Token 0, padding, has no text.
            log.info("embedding %d distinct texts for %s", len(set(names[1:])), path)
            table = build_table(names, embedder=embedder, cache_dir=cache_dir)
            save_table(path, table, about)
        embedding_seconds = 0.0 if is_there else time.perf_counter() - began
    table, _ = load_table(path, expected=about)
    return Prepared(store, table, path, file_sha256(path)[:16], about, embedding_seconds, is_new)


def report(store: EventStore, min_text_coverage: float) -> None:
    """Log the origins of texts, the folded codes and the sizes of the splits; warn if few events have a real text."""
    found = store.vocabulary.report
    for what, shares in found["text_coverage"].items():
        told = ", ".join(f"{ORIGINS[step]} {share:.1%}" for step, share in shares.items() if share)
        log.info("the texts of %s are: %s", what, told or "none")
    log.info(
        "%d tokens for %d codes in train; %d codes with value bins; rare codes: %d folded into their parent, %d kept as plain text",
        found["tokens"],
        found["codes_in_train"],
        found["codes_with_bins"],
        found["rare_codes_folded_into_parent"],
        found["rare_codes_kept_as_plain_text"],
    )
    for split in SPLITS:
        sizes = store.manifest["splits"][split]
        log.info(
            "%s: %d subjects, %d events, %d of them with a code unknown in train",
            split,
            sizes["n_subjects"],
            sizes["n_events"],
            sizes["n_unknown"],
        )
        say_or_refuse(
            sizes.get("n_doubled", 0),  # stores of earlier versions did not count them
            sizes["n_events"],
            f"events of {split} are exact copies of another one (subject, time, code and number), and count as events of their own",
            remedy="If your ETL wrote rows twice, drop them: polars.read_parquet(SHARD).unique(maintain_order=True).",
            refused_from=ONLY_SAID,
        )
    readable = found["text_coverage"]["events"]["readable"]
    if 1 - readable < min_text_coverage:
        log.warning(
            "only %.1f%% of train events have a real text (data.min_text_coverage=%.1f%%): the embedder sees bare codes for the "
            "rest. Add descriptions to metadata/codes.parquet, or type: data.lookups=[FILE.csv] with columns code,term",
            100 * (1 - readable),
            100 * min_text_coverage,
        )
