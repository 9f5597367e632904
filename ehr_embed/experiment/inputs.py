"""Open the source, the event store and the embedding table of a configuration. The commands `embed` and `convert` stop there."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ehr_embed.config.check import checks_config
from ehr_embed.config.instantiate import builder, instantiate_embedder
from ehr_embed.core.errors import UserError
from ehr_embed.core.stopping import stop_requests
from ehr_embed.core.threads import AUTO, use_threads
from ehr_embed.data.labels import available_labels
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedders.protocol import trainable_of
from ehr_embed.embedding.aligning import NONE, AlignmentSettings
from ehr_embed.embedding.prepare import Prepared, prepare, report
from ehr_embed.embedding.table import as_stored
from ehr_embed.embedding.variants import TextVariants, text_variants
from ehr_embed.embedding.vector_cache import embed_texts
from ehr_embed.exports.protocol import Export
from ehr_embed.inference.trained_run import device_named
from ehr_embed.sources.hidden_codes import HiddenCodes
from ehr_embed.sources.protocol import Source
from ehr_embed.sources.renamed import RenamedSource


def open_source(cfg: DictConfig) -> Source:
    """Return the source of a configuration, with codes hidden from train and renamed where the configuration asks for it."""
    source: Source = builder(cfg)(cfg.data.source)
    if cfg.data.hidden_codes:
        source = HiddenCodes(source, share=cfg.data.hidden_codes, seed=cfg.data.hidden_seed)
    if cfg.data.renamed is not None:
        source = RenamedSource(source, table=cfg.data.renamed, missing=cfg.data.renamed_missing)
    return source


def alignment_settings(cfg: DictConfig) -> AlignmentSettings:
    """Return how a configuration aligns codes; those of earlier versions do not.

    Raises:
        UserError: a file that the configuration names cannot be read.
    """
    data = cfg.data
    return AlignmentSettings(
        aligned_to=data.get("aligned_to", NONE),
        rules=data.get("alignment_rules"),
        pairs=data.get("alignment_pairs"),
        texts=data.get("alignment_texts", "own"),
        matching=data.get("alignment_matching", "nearest"),
        twins=data.get("alignment_twins"),
        seed=cfg.get("seed", 0),
        cache=data.get("alignment_cache"),
    )


def variants_of(cfg: DictConfig, prepared: Prepared, settings: AlignmentSettings) -> TextVariants | None:
    """Return the variants by which a configuration reads tokens in training; None where it wants none.

    Raises:
        UserError: the embedder reads no texts, or the vectors themselves are learned, so that there is nothing to vary; or as
            `text_variants`.
    """
    share = cfg.data.get("text_variants", 0.0)
    if not share:
        return None
    embedder = instantiate_embedder(cfg.embedder, trusted=tuple(cfg.trusted_packages))
    try:
        if not embedder.reads_text or trainable_of(cfg.embedder) == "full":
            raise UserError(
                f"data.text_variants={share}: the vectors of this embedder are not those of texts alone (it reads none, or "
                "embedder.trainable=full), so other words mean nothing to it. Type: data.text_variants=0, or embedder=minilm_l6"
            )
        return text_variants(
            prepared.store.vocabulary.texts,
            prepared.table,
            share=share,
            kinds=list(cfg.data.variant_kinds),
            synonyms=settings.read().synonyms,
            embed=lambda texts: embed_texts(embedder, texts, cache_dir=Path(cfg.cache_dir)),
            plain_tokens=prepared.store.vocabulary.plain_tokens,
        )
    finally:
        embedder.close()


def reads_text(cfg: DictConfig) -> bool:
    """Return whether the vectors of a configuration's embedder are those of texts."""
    embedder = instantiate_embedder(cfg.embedder, trusted=tuple(cfg.trusted_packages))
    try:
        return bool(embedder.reads_text)
    finally:
        embedder.close()


def vector_of_words(cfg: DictConfig, words: str) -> Tensor:
    """Return the vector (E,) of words by a configuration's embedder.

    Raises:
        UserError: the embedder reads no texts.
    """
    embedder = instantiate_embedder(cfg.embedder, trusted=tuple(cfg.trusted_packages))
    try:
        if not embedder.reads_text:
            raise UserError(
                f"task.words={words}: this run's embedder has vectors for its own vocabulary only, so it cannot read words. Type: "
                "task.codes=[CODE,CODE]"
            )
        return as_stored(torch.from_numpy(embed_texts(embedder, [words], cache_dir=Path(cfg.cache_dir)))).float()[0]
    finally:
        embedder.close()


def prepare_from(cfg: DictConfig, *, overwrite: bool = False) -> tuple[Source, Prepared]:
    """Return the source of a configuration with its store and table, which are built if they are missing.

    Args:
        cfg: the whole configuration.
        overwrite: whether to build the store and the table again even if they exist.

    Raises:
        UserError: anything that the source, the embedder, the store or the table refuses.
    """
    source = open_source(cfg)
    settings = VocabularySettings(
        values=cfg.data["values"],
        n_bins=cfg.data.n_bins,
        min_count=cfg.data.min_count,
        lookups=tuple(cfg.data.lookups),
        describe_unseen=cfg.data.describe_unseen,
    )
    embedder = instantiate_embedder(cfg.embedder, trusted=tuple(cfg.trusted_packages))
    try:
        prepared = prepare(
            source,
            settings,
            embedder,
            cache_dir=Path(cfg.cache_dir),
            min_text_coverage=cfg.data.min_text_coverage,
            overwrite=overwrite,
            integrity=cfg.get("integrity", "auto"),  # configurations of earlier versions do not have this key
        )
    finally:
        embedder.close()
    return source, prepared


@stop_requests(is_deferred=False)
@checks_config("RunKeys")
def embed(cfg: DictConfig) -> None:
    """Prepare the dataset of a configuration, print where its store and table lie, and export them if an export is named."""
    if cfg.get("check"):  # configurations of earlier versions do not have this key
        from ehr_embed.experiment.outlook import tell_outlook

        return tell_outlook(cfg, Path(cfg.run_dir))
    build = builder(cfg)
    export: Export | None = build(cfg.export) if cfg.get("export") else None
    if export is not None:
        export.check()  # before the embedding, which may take hours
    threads = OmegaConf.select(
        cfg, "trainer.threads", default=AUTO
    )  # configurations of earlier versions do not have this key
    use_threads(threads, key="trainer.threads", device=device_named("auto").type)
    source, prepared = prepare_from(cfg, overwrite=cfg.overwrite)
    if not prepared.is_new:
        report(prepared.store, cfg.data.min_text_coverage)
    n_tokens, width = prepared.table.shape
    print(
        f"store {prepared.store.folder}\ntable {prepared.table_path} ({n_tokens} x {width}, digest {prepared.table_digest})"
    )
    if export is not None:
        export.write(prepared, build(cfg.task), source.labels_dir)


@stop_requests(is_deferred=False)
@checks_config("RunKeys")
def convert(cfg: DictConfig) -> None:
    """Open the source of a configuration, which imports its corpus as MEDS, and print where the dataset lies."""
    source: Source = builder(cfg)(cfg.data.source)
    labels = ", ".join(available_labels(source.labels_dir))
    print(f"MEDS dataset {source.labels_dir.parent} ({len(source.shards)} shards, label sets: {labels})")
