"""The keys of conf/*.yaml that belong to no `_target_`, per entry point. A rule that more than this file needs stands where the
setting is used, and is only named here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, StringConstraints

from ehr_embed.config.check import Built, Keys
from ehr_embed.core.manifest import Integrity
from ehr_embed.core.settings import Count, Files, Folder, OneOf, Positive, Seed, Share, Switch, Text, Told
from ehr_embed.core.threads import Threads
from ehr_embed.data.pool import PoolWeights
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedding.alignment import Matching
from ehr_embed.embedding.event_embedding import Trainable
from ehr_embed.embedding.match_table import Texts
from ehr_embed.embedding.pooling import PoolCodes
from ehr_embed.embedding.variants import Kind
from ehr_embed.evaluation.leakage_audit import Mode as AuditMode
from ehr_embed.models.ensemble import Weights
from ehr_embed.models.sampling import HorizonDays, Sampling
from ehr_embed.models.whitening import Shrinkage, Whiten
from ehr_embed.run_folder.resume import Mode as ResumeMode
from ehr_embed.sources.hidden_codes import HiddenShare
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.sources.renamed import Missing, Table

LabelsName = Annotated[Text | None, Told("the name or path of a label set, or null", example="NAME")]
SplitName = Annotated[Text | None, Told("train, tuning, held_out, or null", example="held_out")]
MaxLength = Annotated[int, Field(ge=1, lt=2**31), Told("1 or more events", example="512")]


class AlignmentKeys(Keys):
    """Keys that say how codes are matched by text."""

    alignment_rules: Annotated[Text | None, Told("a YAML file of rules, or null", example="null")]
    alignment_pairs: Annotated[Text | None, Told("a CSV file with columns code,matched_code, or null", example="null")]
    alignment_texts: Texts
    alignment_matching: Matching
    alignment_twins: Annotated[bool | None, Told("true, false or null", example="false")]


class DataKeys(AlignmentKeys, VocabularySettings):
    """Keys of `data`, with those of the vocabulary."""

    needed = ("source",)
    source: Built
    root: Annotated[Text | None, Told("a folder, or null", example="DIR")]
    min_text_coverage: Share
    hidden_codes: HiddenShare
    hidden_seed: Seed
    renamed: Table
    renamed_missing: Missing
    aligned_to: Annotated[Text, Told("auto, none, or the folder of the run of init_from", example="auto")]
    text_variants: Share
    variant_kinds: Annotated[Sequence[Kind], Told("a list of synonyms, words, neighbours", example="[synonyms]")]
    pool_codes: PoolCodes
    pool_weights: PoolWeights


class EmbedderKeys(Built):
    """Keys of `embedder`, and of an embedder inside it."""

    trainable: Trainable
    inner: EmbedderKeys


class ModelKeys(Built):
    """Keys of `model`."""

    needed = ("max_length",)
    max_length: MaxLength


class StageKeys(Keys):
    """Config groups of a stage, but `data`."""

    embedder: EmbedderKeys
    model: ModelKeys
    task: Built
    trainer: Built
    tracker: Built


class PretrainDataKeys(Keys):
    """Keys of `pretrain.data`, which replace single keys of `data`: checked with the stage that they make."""


class PretrainKeys(StageKeys):
    """Config groups of a first stage."""

    has_only_these = True
    expected = "groups of a first stage, or null, as in conf/experiment/pretrain_then_finetune.yaml"
    data: PretrainDataKeys


class MemberTrainerKeys(Keys):
    """Keys of the `trainer` of a member of an ensemble, which replace single keys of the run's: checked with the run that they
    make."""


class MemberKeys(Keys):
    """Keys of a member of an ensemble."""

    has_only_these = True
    expected = "a mapping with seeds, model or trainer"
    seeds: Annotated[int, Field(ge=1, le=1000), Told("1 to 1000 runs", example="3")]
    model: ModelKeys
    trainer: MemberTrainerKeys


MemberName = Annotated[
    str,
    StringConstraints(pattern="^[A-Za-z0-9][A-Za-z0-9_-]*$"),
    Told(
        "letters, digits, - and _, since the member's runs have folders of this name",
        remedy="Type: ensemble.members={NAME: {seeds: 3}}",
    ),
]


class EventVectorsKeys(Keys):
    """Keys of `event_vectors`, from which models that whiten the vectors of events take what a pipeline sets."""

    has_only_these = True
    expected = "a mapping with whiten and shrinkage, as in conf/pipeline/embedded_based.yaml"
    whiten: Whiten
    shrinkage: Shrinkage


class EnsembleKeys(Keys):
    """Keys of `ensemble`."""

    members: Mapping[MemberName, MemberKeys]
    runs: Annotated[Sequence[Text], Told("a list of finished runs", example="[RUN_DIR]")]
    weights: Weights


class RunKeys(StageKeys):
    """Keys of a run."""

    data: DataKeys
    calibration: Built
    seed: Seed
    run_dir: Folder
    cache_dir: Folder
    resume: ResumeMode
    init_from: Annotated[Text | None, Told("a run's folder, a checkpoint, or null", example="RUN_DIR")]
    pretrain: PretrainKeys | None
    ensemble: EnsembleKeys
    event_vectors: EventVectorsKeys
    integrity: Integrity
    audit: AuditMode
    trusted_packages: Annotated[Sequence[Text], Told("a list of packages", example="[PACKAGE]")]
    check: Switch
    overwrite: Switch
    report: Switch


class DeviceKeys(Keys):
    """Keys of every command that computes with a finished run."""

    trusted_packages: Annotated[Sequence[Text], Told("a list of packages", example="[PACKAGE]")]
    device: Annotated[Text, Told("auto, cpu or cuda", example="auto")]
    threads: Threads
    run: Annotated[Text, Told("the folder of a finished run", example="RUN_DIR")]
    output: Annotated[Text, Told("a file or folder to write", example="OUT")]


class DatasetKeys(Keys):
    """Keys of `data` of the commands for a finished run."""

    root: Annotated[Folder | None, Told("a folder, or null", example="DIR")]
    lookups: Files


class LabelsKeys(Keys):
    """Keys of `task` of the commands for a finished run."""

    labels: LabelsName


class AlignedDatasetKeys(AlignmentKeys, DatasetKeys):
    """Keys of `data` of a command that may align the dataset's codes with those of the run."""

    aligned_to: Annotated[Text, Told("auto, none, or the run's folder", example="auto")]
    alignment_cache: Annotated[Text | None, Told("a folder, or null", example="null")]


class PredictKeys(DeviceKeys):
    """Keys of conf/predict.yaml."""

    data: AlignedDatasetKeys
    task: LabelsKeys
    split: SplitName


class ExplainKeys(DeviceKeys):
    """Keys of conf/explain.yaml; a rule of several keys stands where they are used."""

    data: AlignedDatasetKeys
    task: LabelsKeys
    split: SplitName
    target: Annotated[Text | None, Told("a class of the run, or null", example="null")]
    subject: Annotated[int | None, Told("a subject_id, or null", example="SUBJECT_ID")]
    prediction_time: Annotated[str | int | None, Told("a time such as 2020-01-31, or null", example="null")]
    max_samples: Count
    min_samples: Count
    seed: Seed
    n_steps: Count
    max_steps: Count
    tolerance: Positive


class GenerateKeys(DeviceKeys, Sampling):
    """Keys of conf/generate.yaml; those of `Sampling` have their rules there."""

    data: DatasetKeys
    split: Annotated[str, OneOf(*SPLITS)]
    labels: LabelsName
    stop_codes: Annotated[Sequence[Text], Told("a list of codes", example="[MEDS_DEATH]")]
    prompt_length: Annotated[Count | None, Told("1 or more events, or null", example="null")]
    use_cache: Switch
    batch_size: Annotated[int, Field(ge=1), Told("1 or more prompts", example="32")]
    seed: Seed


class AskKeys(DeviceKeys):
    """Keys of conf/ask.yaml."""

    data: AlignedDatasetKeys
    questions: Annotated[Sequence[Text], Told("a list of words", example="[osteoarthritis]")]
    codes: Annotated[Sequence[Text], Told("a list of codes", example="[CODE]")]
    code_pattern: Annotated[Text | None, Told("a regular expression, or null", example="null")]
    literal: Switch
    n_events: Annotated[int, Field(ge=1), Told("1 or more events", example="8")]
    min_cosine: Annotated[float, Field(ge=-1, le=1), Told("a cosine in [-1, 1]", example="0.5")]
    margin: Annotated[float, Field(ge=0, le=2), Told("a difference of cosines in [0, 2]", example="0.1")]
    horizon_days: HorizonDays
    labels: LabelsName
    split: Annotated[str, OneOf(*SPLITS)] | None
    n_bootstrap: Annotated[int, Field(ge=0)]


class ReportKeys(Keys):
    """Keys of conf/report.yaml."""

    run: Annotated[Text, Told("the folder of a finished run or of a search", example="RUN_DIR")]


class LookupsKeys(Keys):
    """Keys of `data` of a server."""

    lookups: Files


class ServeKeys(DeviceKeys):
    """Keys of conf/serve.yaml."""

    host: Annotated[Text, Told("an address or a name of this machine", example="127.0.0.1")]
    port: Annotated[int, Field(ge=0, le=65_535), Told("0 to 65535", example="8000")]
    allowed_hosts: Annotated[Sequence[Text] | None, Told("a list of host names, or null", example="[ward.example]")]
    data: LookupsKeys
    max_body_mib: Annotated[float, Field(gt=0, le=1024), Told("more than 0 and at most 1024 MiB", example="16")]
    max_records: Count
    max_events: Count
    max_attributed: Count
    max_batch: Count
    max_wait_ms: Annotated[float, Field(ge=0, le=10_000), Told("0 to 10000 milliseconds", example="0")]
    max_queued: Count
    max_connections: Count
    timeout_s: Annotated[float, Field(gt=0, le=86_400), Told("more than 0 seconds", example="30")]
    shutdown_s: Annotated[float, Field(ge=0, le=86_400), Told("0 seconds or more", example="20")]
    n_steps: Count
    max_steps: Count
    tolerance: Positive


class RepresentKeys(DeviceKeys):
    """Keys of conf/represent.yaml; `Representer` says which values `per` and `pooling` have."""

    data: AlignedDatasetKeys
    task: LabelsKeys
    split: SplitName
    per: Text
    pooling: Text
