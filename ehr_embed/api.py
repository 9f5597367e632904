"""Public names for your own model, embedder, task, schedule, optimizer or source: import them from here.

These names stay in this module, while the modules that define them may move. docs/extending.md builds one example per config
group from these names alone. The protocols document, with shapes, which members such a class must have and which it may have.
"""

from __future__ import annotations

from ehr_embed.calibration.protocol import Calibration
from ehr_embed.core.errors import UserError, check_range, unknown_name
from ehr_embed.core.files import atomic_path, file_sha256
from ehr_embed.core.settings import Count, OneOf, Seed, Share, Told, Width, checked
from ehr_embed.data.batches import MICROSECONDS_PER_DAY, Batch, BatchDataset
from ehr_embed.data.event_set import EventSet
from ehr_embed.data.labels import LabelSet, read_labels
from ehr_embed.data.samples import Samples, build_samples
from ehr_embed.data.store import STATIC_TIME, EventStore, SplitEvents
from ehr_embed.data.vocabulary import PADDING, UNKNOWN, Vocabulary
from ehr_embed.embedders.protocol import Embedder
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.evaluation.bootstrap import SubjectBootstrap
from ehr_embed.evaluation.metric import Metric
from ehr_embed.evaluation.metrics import summaries
from ehr_embed.evaluation.predictions import write_multiclass_predictions, write_predictions
from ehr_embed.exports.protocol import Export
from ehr_embed.models.blocks import Block
from ehr_embed.models.body import Body, EventInput
from ehr_embed.models.event_vectors import event_vectors
from ehr_embed.models.heads import LogitLinear, Pooling, build_head, check_classifies
from ehr_embed.models.protocol import AdaptsToVectors, Declarations, FeatureSet, FitsAtOnce, Model, ReadsVocabulary
from ehr_embed.sources.imported import import_folder, import_once
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.meds_writer import MedsWriter
from ehr_embed.sources.protocol import SPLITS, Source
from ehr_embed.tasks.classes_from_records import ClassesFromRecords
from ehr_embed.tasks.classification import Classification
from ehr_embed.tasks.protocol import Curves, Outputs, StepResult, Task
from ehr_embed.trackers.protocol import Tracker
from ehr_embed.training.protocol import Course, FollowsMetric, MakesOptimizer, Schedule

__all__ = [
    "MICROSECONDS_PER_DAY",
    "PADDING",
    "SPLITS",
    "STATIC_TIME",
    "UNKNOWN",
    "AdaptsToVectors",
    "Batch",
    "BatchDataset",
    "Block",
    "Body",
    "Calibration",
    "ClassesFromRecords",
    "Classification",
    "Count",
    "Course",
    "Curves",
    "Declarations",
    "Embedder",
    "EventEmbedding",
    "EventInput",
    "EventSet",
    "EventStore",
    "Export",
    "FeatureSet",
    "FitsAtOnce",
    "FollowsMetric",
    "LabelSet",
    "LogitLinear",
    "MakesOptimizer",
    "MedsSource",
    "MedsWriter",
    "Metric",
    "Model",
    "OneOf",
    "Outputs",
    "Pooling",
    "ReadsVocabulary",
    "Samples",
    "Schedule",
    "Seed",
    "Share",
    "Source",
    "SplitEvents",
    "StepResult",
    "SubjectBootstrap",
    "Task",
    "Told",
    "Tracker",
    "UserError",
    "Vocabulary",
    "Width",
    "atomic_path",
    "build_head",
    "build_samples",
    "check_classifies",
    "check_range",
    "checked",
    "event_vectors",
    "file_sha256",
    "import_folder",
    "import_once",
    "read_labels",
    "summaries",
    "unknown_name",
    "write_multiclass_predictions",
    "write_predictions",
]
