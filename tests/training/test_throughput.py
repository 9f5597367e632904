"""A run states its speed rightly: FLOPs as torch counts them, the share of the peak, the profile."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ehr_embed.models.decoder import Decoder
from ehr_embed.models.encoder import Encoder
from ehr_embed.models.gru import GRU
from ehr_embed.training.throughput import TrainingFlops, peak_flops, rates, training_flops
from tests.helpers.planted import planted, train, without_times  # noqa: F401 (a fixture)

B, T, E, V, D, L = 3, 16, 12, 40, 32, 2
SIZES = {"embedding_dim": E, "model_dim": D, "n_heads": 2, "n_layers": L}


def counted(model, inputs) -> int:
    """Matrix products of forward and backward pass, by torch's counter."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it knows no fused kernel of a CPU
        out = model(inputs)
        (out if isinstance(out, torch.Tensor) else out.nll).sum().backward()
    return counter.get_total_flops()


def inputs(**more):
    times = {name: torch.rand(B, T) for name in ("gap_days", "elapsed_days", "age_days")}
    return times | {"embeddings": torch.randn(B, T, E), "padding_mask": torch.ones(B, T, dtype=torch.bool)} | more


def test_flops_are_those_of_torchs_counter_but_for_projection_and_head():
    model = Encoder(**SIZES, num_classes=2, times=["age"])
    flops = training_flops(model, V)
    assert flops is not None
    projection = 6 * B * T * E * D
    times = -2 * B * T * D * D  # nothing before the times learns either
    head = 6 * B * D * 2
    expected = flops.per_event * B * T + flops.per_pair * B * T * T
    assert counted(model, inputs()) == expected + projection + times + head


def test_a_decoder_scores_the_vocabulary_and_sees_half_of_the_pairs():
    model, encoder = Decoder(**SIZES, vocab_size=V, times=[]), Encoder(**SIZES, num_classes=2, times=[])
    flops, both_ways = training_flops(model, V), training_flops(encoder, V)
    assert flops is not None
    assert both_ways is not None
    assert flops.per_event == both_ways.per_event + 6 * V * D
    assert flops.per_pair == both_ways.per_pair / 2
    model.body.requires_grad_(False)
    frozen = training_flops(model, V)
    assert frozen is not None
    assert frozen.per_pair == flops.per_pair / 3
    assert training_flops(GRU(embedding_dim=E, num_classes=2), V) is None


def test_a_share_above_one_is_left_out_and_said_once(caplog):
    flops = TrainingFlops(per_event=10.0, per_pair=0.0)
    assert rates(80, 100, 0, 2.0, flops, 400.0)["mfu"] == 1.0
    assert not caplog.records
    for _ in range(3):
        found = rates(80, 100, 0, 2.0, flops, 399.0)
        assert found.keys() == {"events_per_s", "tokens_per_s", "padding_share"}
    assert len(caplog.records) == 1
    assert "that peak is wrong and no mfu is given" in caplog.text


def test_the_peak_is_measured_on_a_cpu():
    measured = peak_flops(torch.device("cpu"), "32-true")
    assert measured is not None
    assert 1e8 < measured < 1e15


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12, 67e12),
        ("NVIDIA H100 PCIe", 756.5e12, 51e12),
        ("NVIDIA H100 NVL", 835.5e12, 60e12),
        ("NVIDIA H200", 989.5e12, 67e12),
        ("NVIDIA H200 NVL", 835.5e12, 60e12),
        ("NVIDIA GB200", 2500e12, 80e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100-PCIE-40GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40", 181.05e12, 90.5e12),
        ("NVIDIA L40S", 362.05e12, 91.6e12),
        ("NVIDIA A40", 149.7e12, 37.4e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA RTX A6000", 154.8e12, 38.7e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 3090", 71e12, 35.6e12),
        ("Tesla T4", 65e12, 8.1e12),
        ("Tesla V100-SXM2-32GB", 125e12, 15.7e12),
        ("Tesla V100-PCIE-16GB", 112e12, 14e12),
        ("Tesla V100S-PCIE-32GB", 130e12, 16.4e12),
        ("AMD Instinct MI300X", 1307.4e12, 163.4e12),
        *(
            (f"NVIDIA {other}", None, None)
            for other in (
                "H100 80GB HBM3 MIG 1g.10gb", "H100 64GB HBM2", "A10G", "A100-SXM-64GB", "A30", "L20", "T400", "GH200 480GB",
                "GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 D", "GeForce RTX 3090 Ti", "RTX 6000 Ada Generation", "GPU",
            )
        ),
    ],
)  # fmt: skip
def test_the_peak_of_a_gpu_is_looked_up(monkeypatch, name, half, single):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16-mixed") == half
    assert peak_flops(torch.device("cuda"), "32-true") == single


def test_a_profile_says_where_the_time_went_and_changes_nothing(planted, tmp_path, capsys):
    _, plain, *_ = train(planted, tmp_path / "plain", epochs=2)
    assert not (tmp_path / "plain" / "profile.json").exists()
    _, profiled, *_ = train(planted, tmp_path / "run", epochs=2, profile=True)
    assert without_times(profiled) == without_times(plain)
    table = capsys.readouterr().out
    assert "of 8 batches" in table
    assert "operation" in table
    assert "aten::" in table
    events = json.loads((tmp_path / "run" / "profile.json").read_text())["traceEvents"]
    assert any("attention" in event["name"] for event in events)


def test_a_profile_of_fewer_batches_says_how_many(planted, tmp_path, capsys):
    train(planted, tmp_path / "run", epochs=1)
    assert "batches went" not in capsys.readouterr().out
    train(planted, tmp_path / "short", epochs=1, profile=True)
    assert "of 5 batches" in capsys.readouterr().out  # eight in all, the first three not profiled


def test_a_run_too_short_to_profile_says_so(planted, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(planted, tmp_path / "run", epochs=1, batch_size=60, profile=True)
    assert "ended before batch 4" in caplog.text
