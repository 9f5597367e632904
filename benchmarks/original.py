"""The original design, written out plainly as what the benchmarks measure against.

A dense float32 file a subject, a DataLoader with random batches padded to the longest, `torch.nn.TransformerEncoder`, float32.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ehr_embed.models.encoder import Encoder

NAMES = {
    r"^(norm|project)\.": r"body.input.\1.",
    r"^classes\.": "head.classes.",
    r"^encoder\.norm": "body.norm",
    r"^encoder\.layers": "body.blocks",
    r"self_attn\.in_proj_": "attention.qkv.",
    r"self_attn\.out_proj": "attention.out",
    r"\.norm1": ".norm_attention",
    r"\.norm2": ".norm_mlp",
    r"\.linear1": ".mlp.0",
    r"\.linear2": ".mlp.2",
}
"""Parts of the original's parameter names by what they are called in `Encoder`."""


class PatientFiles(Dataset[dict[str, Tensor]]):
    """{'embeddings': (N, E) float32, 'token_ids': (N,), 'label': ()} of every file of a folder."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("patient_*.pt"), key=lambda path: int(path.stem.split("_")[1]))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        record: dict[str, Tensor] = torch.load(self.paths[index], weights_only=True)
        return record


def pad(records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """`embeddings` (B, T, E), `padding_mask` (B, T) with True = event, `label` (B,)."""
    vectors = [record["embeddings"] for record in records]
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in vectors], batch_first=True)
    return {
        "embeddings": nn.utils.rnn.pad_sequence(vectors, batch_first=True),
        "padding_mask": mask,
        "label": torch.stack([record["label"] for record in records]),
    }


def loader(folder: Path, batch_size: int, num_workers: int = 0) -> DataLoader[Any]:
    """Random batches of the folder's files."""
    return DataLoader(
        PatientFiles(folder), batch_size=batch_size, shuffle=True, collate_fn=pad, num_workers=num_workers
    )


class OriginalEncoder(nn.Module):
    """Projection, sinusoidal positions, `nn.TransformerEncoder`, mean over events, linear classes."""

    def __init__(
        self,
        *,
        embedding_dim: int,
        model_dim: int,
        n_heads: int,
        n_layers: int,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embedding_dim)
        self.project = nn.Linear(embedding_dim, model_dim)
        layer = nn.TransformerEncoderLayer(
            model_dim,
            n_heads,
            4 * model_dim,
            dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, n_layers, norm=nn.LayerNorm(model_dim), enable_nested_tensor=False)
        self.classes = nn.Linear(model_dim, num_classes)

    def forward(self, embeddings: Tensor, padding_mask: Tensor) -> Tensor:
        """(B, T, E), True = event -> logits (B, num_classes)."""
        x = self.project(self.norm(embeddings))
        x = x + positions(x.shape[1], x.shape[2], x.device)
        x = self.encoder(x, src_key_padding_mask=~padding_mask)
        keep = padding_mask.unsqueeze(-1)
        logits: Tensor = self.classes((x * keep).sum(1) / keep.sum(1))
        return logits

    def load(self, model: Encoder) -> None:
        """Take the weights of our model of the same size."""
        theirs = model.state_dict()
        self.load_state_dict({name: theirs[our_name(name)] for name in self.state_dict()})


def our_name(name: str) -> str:
    """Return the name in `Encoder` of a parameter of the original.

    >>> our_name("encoder.layers.1.self_attn.in_proj_weight"), our_name("norm.bias")
    ('body.blocks.1.attention.qkv.weight', 'body.input.norm.bias')
    """
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def positions(length: int, dim: int, device: torch.device) -> Tensor:
    """Sinusoids (Vaswani et al. 2017), sines before cosines, (length, dim)."""
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(0, dim, 2, device=device) / dim)
    angle = torch.arange(length, device=device)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
