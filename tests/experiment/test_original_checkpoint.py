"""A checkpoint of the original pipeline becomes a run with its logits, for predict and fine-tuning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ehr_embed
from ehr_embed.core.errors import UserError
from ehr_embed.experiment.original_checkpoint import convert_checkpoint
from ehr_embed.experiment.run import run
from tests.helpers.configs import composed

E, D, HEADS, LAYERS = 16, 24, 3, 2


class Plain(nn.Module):
    """The original's model, written down anew from its description in torch.nn's words."""

    def __init__(self, *, embedding_dim: int, name: str) -> None:
        super().__init__()
        same = embedding_dim == D
        self.input_projection = nn.Identity() if same else nn.Linear(embedding_dim, D)
        self.pos_encoding = nn.Module()
        pe, place = torch.zeros(1, 32, D), torch.arange(32.0)[:, None]
        rate = torch.exp(torch.arange(0, D, 2) * (-math.log(10000.0) / D))
        pe[0, :, 0::2], pe[0, :, 1::2] = torch.sin(place * rate), torch.cos(place * rate)
        self.pos_encoding.register_buffer("pe", pe)
        layer = nn.TransformerEncoderLayer(D, HEADS, 4 * D, 0.1, activation="gelu", batch_first=True, norm_first=True)
        self.name = name
        setattr(self, name, nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False))
        if name == "transformer_decoder":
            self.lm_head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 50))
        self.classifier = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2))

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits (2,) of one record (N, E)."""
        x = self.input_projection(vectors[None]) + self.pos_encoding.pe[:, : len(vectors)]
        later = torch.full((len(vectors), len(vectors)), float("-inf")).triu(1) if "decoder" in self.name else None
        return self.classifier(getattr(self, self.name)(x, mask=later).mean(1))[0]


def saved(path, *, name: str = "transformer_encoder", embedding_dim: int = E, **settings) -> Plain:
    torch.manual_seed(3)
    model = Plain(embedding_dim=embedding_dim, name=name).eval()
    config = {"model": {"n_heads": HEADS, "context_length": 32, "dropout": 0.1} | settings, "training": {"epochs": 3}}
    metrics = {"f1": np.float64(0.5), "loss": 0.7}  # scikit-learn's, as the original saves them
    torch.save({"epoch": 3, "model_state_dict": model.state_dict(), "val_metrics": metrics, "config": config}, path)
    return model


def converted(tiny, tmp_path, *overrides: str):
    return convert_checkpoint(
        composed(
            "data=meds", f"data.root={tiny}", "data.min_count=1", "embedder=hashing", f"embedder.embedding_dim={E}",
            f"cache_dir={tmp_path / 'cache'}", f"checkpoint={tmp_path / 'old.pt'}", f"output={tmp_path / 'run'}",
            *overrides, name="convert",
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", ["transformer_encoder", "transformer_decoder"])
def test_logits_are_those_of_the_original(tiny, tmp_path, name):
    plain = saved(tmp_path / "old.pt", name=name)
    folder = converted(tiny, tmp_path)
    predictor = ehr_embed.load(folder)
    records = [np.random.default_rng(n).normal(size=(n, E)).astype(np.float32) for n in (1, 4, 9)]
    with torch.inference_mode():
        expected = torch.stack([plain(torch.from_numpy(record)).softmax(-1) for record in records])
    np.testing.assert_allclose(predictor.predict_proba(records), expected.numpy(), atol=1e-5)
    assert predictor.run.model.is_causal == (name == "transformer_decoder")
    assert len(predictor.predict_proba(str(tiny), labels="outcome", split=None)) == 9


def test_equal_widths_have_no_projection_and_heads_may_be_given(tiny, tmp_path):
    plain = saved(tmp_path / "old.pt", embedding_dim=D, n_heads=None)
    with pytest.raises(UserError, match="Type: n_heads=NUMBER"):
        converted(tiny, tmp_path)
    folder = converted(tiny, tmp_path, f"n_heads={HEADS}", "data.values=none", f"++embedder.embedding_dim={D}")
    record = np.random.default_rng(0).normal(size=(5, D)).astype(np.float32)
    with torch.inference_mode():
        expected = plain(torch.from_numpy(record)).softmax(-1).numpy()
    np.testing.assert_allclose(ehr_embed.load(folder).predict_proba(record)[0], expected, atol=1e-5)


def test_it_is_fine_tuned(tiny, tmp_path):
    saved(tmp_path / "old.pt")
    folder = converted(tiny, tmp_path)
    options = (f"model.model_dim={D}", f"model.n_heads={HEADS}", f"model.n_layers={LAYERS}", "model.max_length=32")
    run(
        composed(
            "data=meds", f"data.root={tiny}", "data.min_count=1", "embedder=hashing", f"embedder.embedding_dim={E}",
            "model=original", *options, "trainer.epochs=1", "trainer.n_bootstrap=0", "trainer.freeze=body",
            "task.labels=outcome", f"init_from={folder}", f"cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'tuned'}",
        )
    )  # fmt: skip
    old, new = (ehr_embed.load(where).run.model.state_dict() for where in (folder, tmp_path / "tuned"))
    body = [name for name in old if name.startswith("body.")]
    assert len(body) > 10
    assert all(torch.equal(old[name], new[name]) for name in body), "a frozen body keeps the original's weights"


def test_what_is_no_such_checkpoint_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match=r"old\.pt"):
        converted(tiny, tmp_path)
    (tmp_path / "old.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"old\.pt: .*Type: python -m ehr_embed\.convert checkpoint=OLD\.pt"):
        converted(tiny, tmp_path)
    torch.save({"model_state_dict": {"x": torch.zeros(1)}}, tmp_path / "old.pt")
    with pytest.raises(UserError, match=r"old\.pt: .*transformer_encoder\.layers\.0.*; found x"):
        converted(tiny, tmp_path)
    saved(tmp_path / "old.pt", embedding_dim=D + 2)
    with pytest.raises(UserError, match=r"old\.pt .* 26, .* 16:"):
        converted(tiny, tmp_path)
    assert not (tmp_path / "run").exists()
