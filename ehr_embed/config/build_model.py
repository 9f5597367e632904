"""Build the model of a configuration: a module of its own, since the command line answers before torch is loaded."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from torch import nn

from ehr_embed.config.instantiate import instantiate
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.hazards import HAZARDS, HazardSizes, with_hazards
from ehr_embed.models.protocol import ReadsVocabulary


def build_model(
    config: DictConfig, vocabulary: Vocabulary, *, trusted: tuple[str, ...] = (), sizes: dict[str, Any]
) -> nn.Module:
    """Return the model of a configuration, for events of `vocabulary`.

    Raises:
        UserError: as `instantiate`.
    """
    given = {name: size for name, size in sizes.items() if name != HAZARDS}
    model: nn.Module = instantiate(config, trusted=trusted, **given)
    if HAZARDS in sizes:
        model = with_hazards(model, HazardSizes(**sizes[HAZARDS]), embedding_dim=sizes["embedding_dim"])
    if isinstance(model, ReadsVocabulary):
        model.set_vocabulary(vocabulary)
    return model
