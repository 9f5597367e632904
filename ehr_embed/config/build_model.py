"""Build the model of a configuration: a module of its own, since the command line answers before torch is loaded."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from ehr_embed.config.instantiate import instantiate
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.hazards import HAZARDS, HazardSizes, with_hazards
from ehr_embed.models.label_outputs import LABEL_OUTPUTS, with_label_outputs
from ehr_embed.models.protocol import ReadsVocabulary


def of_constructor(sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes that a model's constructor takes; the others are for parts that `build_model` adds."""
    return {name: size for name, size in sizes.items() if name not in (HAZARDS, LABEL_OUTPUTS)}


def build_model(
    config: DictConfig, vocabulary: Vocabulary, *, trusted: tuple[str, ...] = (), sizes: dict[str, Any]
) -> nn.Module:
    """Return the model of a configuration, for events of `vocabulary`; the `members` of a model of models are built likewise.

    Raises:
        UserError: as `instantiate`.
    """
    given = of_constructor(sizes)
    if OmegaConf.is_list(config.get("members")):
        own = dict(given)
        given["members"] = [build_model(member, vocabulary, trusted=trusted, sizes=own) for member in config.members]
        config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "members"])
    model: nn.Module = instantiate(config, trusted=trusted, **given)
    if HAZARDS in sizes:
        model = with_hazards(model, HazardSizes(**sizes[HAZARDS]), embedding_dim=sizes["embedding_dim"])
    if LABEL_OUTPUTS in sizes:
        model = with_label_outputs(model, sizes[LABEL_OUTPUTS])
    if isinstance(model, ReadsVocabulary):
        model.set_vocabulary(vocabulary)
    return model
