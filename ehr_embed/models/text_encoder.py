"""A published text encoder that is fine-tuned end to end on records written as text."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ehr_embed.core.errors import UserError
from ehr_embed.core.pretrained_weights import load_pretrained
from ehr_embed.core.settings import Count, OneOf, Told, checked
from ehr_embed.core.transfer import reads_freely
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.blocks import DropShare
from ehr_embed.models.heads import PooledHead, check_classifies
from ehr_embed.models.record_text import RecordText

log = logging.getLogger(__name__)
POOLINGS = ("mean", "cls")
SEE_ALL = frozenset({"bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "electra"})
"""Types of backbones of which each layer lets every piece see all pieces. Others have a mask per layer, or a causal one, which
transformers builds from the pieces' mask only."""


class TextEncoder(nn.Module):
    """Text encoder over the texts of a record's events, written as `[CLS] text; text; 3 days later: text; [SEP]`.

    The model looks up the texts of `token_ids` in the vocabulary that `set_vocabulary` sets. It reads no event vectors,
    so the embedder does not matter. Value bins are part of the tokens' texts; numeric values of events
    (`data.values=continuous`) are not written.

    Args:
        embedding_dim: width E of the event vectors, which this model does not read.
        num_classes: number of outputs, set by the task.
        vocab_size: must be None, because this model predicts classes only.
        has_values: whether batches carry a numeric value with each event; ignored.
        backbone: `bundled` (all-MiniLM-L6-v2), a folder, or a hub id of an encoder.
        revision: commit, branch or tag on the hub; None takes the local copy if there is one, else the newest.
        max_pieces: longest record in word pieces; a longer record keeps its static events and then its last events.
        max_length: longest sequence in events, to which a record is cut before it is written as text.
        times: whether to write the time between two events that are a day or more apart.
        pooling: `mean` of the pieces' vectors, or `cls`, the first vector.
        dropout: dropout probability on the pooled vector; the backbone keeps its own dropout.
        lora_rank: rank of low-rank updates (LoRA, Hu et al. 2021, arXiv:2106.09685; scaled by 2) that are trained in
            place of the backbone's matrices; None trains the whole backbone.

    Raises:
        UserError: the task predicts events, the pooling is unknown, the weights cannot be loaded or are no encoder,
            `max_pieces` exceeds the backbone's positions, or peft is missing for `lora_rank`.
    """

    is_causal = False
    reads_vectors = False

    @checked("model")
    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        backbone: str = "bundled",
        revision: str | None = None,
        max_pieces: int = 256,
        max_length: int = 128,
        times: bool = True,
        pooling: Annotated[str, OneOf(*POOLINGS)] = "mean",
        dropout: DropShare = 0.1,
        lora_rank: Annotated[Count | None, Told(remedy="null = train the whole backbone.")] = None,
    ) -> None:
        super().__init__()
        n_classes = check_classifies("model=text_encoder", num_classes, vocab_size)
        tokenizer, body = load_pretrained(
            _load, backbone, revision, key="model.backbone", offline="model.backbone=bundled"
        )
        _check_encoder(backbone, body.config, max_pieces)
        self.learns_all = backbone == "bundled"  # parts of other backbones may not lead to the last layer's vectors
        body.pooler = None  # it serves next-sentence prediction; its weights would never get a gradient
        self.body = body if lora_rank is None else with_lora(body, lora_rank)
        self.text = RecordText(tokenizer, max_pieces=max_pieces, times=times)
        self.head = PooledHead(
            pooling=pooling, model_dim=body.config.hidden_size, num_classes=n_classes, dropout=dropout
        )

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        if vocabulary.settings.values == "continuous":
            log.warning(
                "data.values=continuous keeps numbers beside the tokens, and model=text_encoder reads texts only: it sees no "
                "number. Type: data.values=bins"
            )
        self.text.set_texts(vocabulary.texts)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits (B, num_classes); inputs as in `RecordText.forward`."""
        pieces_BL, is_piece_BL = self.text(inputs)
        mask = is_piece_BL.long()
        config: Any = self.body.config
        sees_all = config.model_type in SEE_ALL and not getattr(config, "is_decoder", False)
        is_sdpa = getattr(config, "_attn_implementation", None) == "sdpa"
        if sees_all and is_sdpa and not reads_freely(mask.device):
            # Given (B, L), transformers reads back whether any piece is padding; the mask of all pairs it takes as it is.
            mask = is_piece_BL[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        x_BLD = self.body(input_ids=pieces_BL, attention_mask=mask).last_hidden_state
        return self.head(x_BLD, {"padding_mask": is_piece_BL})


def with_lora(body: nn.Module, rank: int) -> nn.Module:
    """Add trainable low-rank updates to the linear maps of `body`, and freeze everything else.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            f"model.lora_rank={rank}: peft is not installed. Type: pip install -c constraints.txt -e '.[lora]'"
        ) from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapted: nn.Module = inject_adapter_in_model(config, body)
    return adapted


def _load(name: str, revision: str | None) -> tuple[Any, Any]:
    transformers_logging.disable_progress_bar()
    # Left unsaid, transformers would ask at the terminal whether to run the code that a folder brings.
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    return tokenizer, AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32, trust_remote_code=False)


def _check_encoder(backbone: str, config: Any, max_pieces: int) -> None:
    if config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        raise UserError(
            f"model.backbone={backbone} is a {config.model_type} model, not an encoder. Use an encoder such as BERT, or "
            "type: model.backbone=bundled"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and max_pieces > longest:
        raise UserError(
            f"model.max_pieces={max_pieces}, but {backbone} has {longest} positions. Type: model.max_pieces={longest} or less"
        )
