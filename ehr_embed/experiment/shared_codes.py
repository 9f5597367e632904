"""Read the codes of a stage's data as those of the run that its weights start from, or of datasets pooled with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from ehr_embed.core.errors import UserError
from ehr_embed.data.pool import Pool
from ehr_embed.data.selected import SelectedStore
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.embedding.aligning import AUTO, aligned_table, wanted_alignment
from ehr_embed.embedding.match_table import Alignment
from ehr_embed.embedding.pooling import pool_alignment
from ehr_embed.embedding.prepare import Prepared
from ehr_embed.experiment.inputs import reads_text
from ehr_embed.experiment.parts import Inputs, Plan
from ehr_embed.models.protocol import AlignsCodes, PoolsCodes, ReadsVocabulary, align_codes
from ehr_embed.run_folder.origin import Origin, has_vocabulary, read_origin


def pool_inputs(plan: Plan, prepared: Prepared) -> Alignment | None:
    """Return the alignment by which codes of pooled datasets are read as each other; None if there is one dataset, or every code is
    read as itself."""
    pool = Pool.of(prepared.store.manifest)
    if pool is None or not plan.pools_codes or plan.task.needs_causal is not None:
        return None
    return pool_alignment(
        replace(plan.alignment, aligned_to=AUTO), prepared.store.vocabulary, pool, cache_dir=Path(plan.cfg.cache_dir)
    )


def align_inputs(plan: Plan, prepared: Prepared) -> tuple[Prepared, tuple[Origin, Alignment] | None]:
    """Return the inputs in the codes of the run of `init_from`, with the alignment, or unchanged where no alignment is wanted.

    Raises:
        UserError: the alignment is asked for, and there is no run to align with or its task predicts events; or nothing matches.
    """
    asked, init_from = plan.alignment, plan.init_from
    if asked.is_off:
        return prepared, None
    predicts_classes = plan.task.needs_causal is None
    if init_from is None or not has_vocabulary(init_from) or not predicts_classes:
        if asked.aligned_to == AUTO:
            return prepared, None
        raise UserError(
            f"data.aligned_to={asked.aligned_to}: expected a model that predicts classes and comes from a run's folder, with whose "
            f"codes to align; init_from is {init_from or 'null'} and the task {type(plan.task).__name__}. Type: init_from=RUN_DIR"
        )
    origin, store = read_origin(init_from), prepared.store
    alignment = wanted_alignment(
        asked, origin.vocabulary, store.vocabulary, has_twins=origin.has_twins, cache_dir=Path(plan.cfg.cache_dir)
    )
    if alignment is None:
        return prepared, None
    if origin.pooled is not None:
        alignment = alignment.through(origin.pooled)
    own = prepared.table if reads_text(plan.cfg) else None
    table = aligned_table(alignment, origin.vocabulary, store.vocabulary, origin.vectors, own)
    selected = SelectedStore(store, alignment.keeps(store.vocabulary), why=alignment.digest)
    return replace(prepared, store=selected, table=table), (origin, alignment)


def pool_model(model: nn.Module | None, inputs: Inputs) -> None:
    """Let a model that reads codes read those of pooled datasets as each other: by the pool of this run, or by that of the run
    from which it starts, whose codes it keeps."""
    if not isinstance(model, PoolsCodes):
        return
    if inputs.aligned is not None and inputs.aligned[0].pooled is not None:
        model.pool(inputs.aligned[0].pooled)
    elif inputs.pooled is not None:
        pool, codes = Pool.of(inputs.prepared.store.manifest), list(inputs.pooled.matches)
        assert pool is not None
        model.pool(inputs.pooled.matches, dict(zip(codes, pool.of_codes(list(codes)).tolist(), strict=True)))


def align_model(model: nn.Module, vocabulary: Vocabulary, alignment: Alignment) -> None:
    """Let a model that reads codes or texts read those of `vocabulary` as `alignment` says."""
    if isinstance(model, ReadsVocabulary):
        model.set_vocabulary(vocabulary)
    if isinstance(model, AlignsCodes):
        align_codes(model, alignment.matches, alignment.twins)
