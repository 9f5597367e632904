"""The bundled all-MiniLM-L6-v2 in torch's own operations.

`sentence_transformers` computes the same vectors, but takes two seconds to import, which was a fifth of the time from an empty
cache to the demo's first epoch.

Shapes: B texts, T word pieces, D width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

WIDTH, N_LAYERS, N_HEADS = 384, 6, 12
LONGEST = 256
"""Word pieces of a text that are read, as the model's authors set it."""
EPSILON = 1e-12


class BundledEncoder:
    """BERT (Devlin et al. 2019, arXiv:1810.04805) whose word pieces are averaged (Reimers and Gurevych 2019, arXiv:1908.10084).

    It has the sizes of all-MiniLM-L6-v2 alone, computes in float32 on the CPU, and cannot be trained.

    Args:
        folder: that of the published model, whose checksum `load_pretrained` has compared.
    """

    width = WIDTH

    def __init__(self, folder: Path) -> None:
        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(LONGEST)
        self.tokenizer.enable_padding()

    def encode(self, texts: Sequence[str], *, batch_size: int, normalize: bool) -> npt.NDArray[np.float32]:
        """Return the vectors (n, D) of texts; the model scales them to a norm of one, with `normalize` or without.

        Texts of similar length meet in a batch, so that little of it is padding.
        """
        order = np.argsort([-len(text) for text in texts])
        vectors = np.empty((len(texts), WIDTH), np.float32)
        with torch.inference_mode():
            for start in range(0, len(texts), batch_size):
                rows = order[start : start + batch_size]
                vector_BD = self._vectors([texts[row] for row in rows])
                # Twice, as sentence-transformers does, because the last bit can change.
                vectors[rows] = F.normalize(vector_BD, dim=1) if normalize else vector_BD
        return vectors

    def _vectors(self, texts: list[str]) -> Tensor:
        """Return the vectors (B, D) of one batch, of norm one."""
        pieces = self.tokenizer.encode_batch(texts)
        ids_BT = torch.tensor([text.ids for text in pieces])
        mask_BT = torch.tensor([text.attention_mask for text in pieces], dtype=torch.bool)
        mask = None if bool(mask_BT.all()) else mask_BT[:, None, None].expand(-1, 1, mask_BT.shape[1], -1)
        w = self.weights
        x_BTD = F.embedding(ids_BT, w["embeddings.word_embeddings.weight"])
        x_BTD = x_BTD + w["embeddings.token_type_embeddings.weight"][0]
        x_BTD = x_BTD + w["embeddings.position_embeddings.weight"][: ids_BT.shape[1]]
        x_BTD = self._norm(x_BTD, "embeddings.")
        for layer in range(N_LAYERS):
            at = f"encoder.layer.{layer}."
            q, k, v = (
                self._linear(x_BTD, f"{at}attention.self.{name}").unflatten(-1, (N_HEADS, -1)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
            x_BTD = self._norm(self._linear(attended, f"{at}attention.output.dense") + x_BTD, f"{at}attention.output.")
            hidden = F.gelu(self._linear(x_BTD, f"{at}intermediate.dense"))
            x_BTD = self._norm(self._linear(hidden, f"{at}output.dense") + x_BTD, f"{at}output.")
        weight_BT1 = mask_BT.unsqueeze(-1).float()
        return F.normalize((x_BTD * weight_BT1).sum(1) / weight_BT1.sum(1), dim=1)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, at: str) -> Tensor:
        weight, bias = (self.weights[f"{at}LayerNorm.{name}"] for name in ("weight", "bias"))
        return F.layer_norm(x, (WIDTH,), weight, bias, EPSILON)
