"""An epoch of training, or futures, of MEDS_EIC_AR; benchmarks/peers runs it with the Python of an environment that has it.

PYTHON benchmarks/peers/run_meds_eic_ar.py RECORDS train
PYTHON benchmarks/peers/run_meds_eic_ar.py RECORDS generate

The package's own Llama, its Lightning module with its metrics, its optimizer's settings and its `generate`; the model has the given
sizes and random weights. The records take the place of its preprocessing, which would make other tokens of the same events.
"""

import sys
from functools import partial
from importlib import metadata
from typing import Any

import lightning
import torch
from MEDS_EIC_AR.model.model import Model
from MEDS_EIC_AR.training.metrics import NextCodeMetrics
from MEDS_EIC_AR.training.module import MEICARModule
from meds_torchdata import MEDSTorchBatch
from records import Records, pad, say, seconds
from torch.utils.data import DataLoader


def batch_of(token_ids: torch.Tensor) -> MEDSTorchBatch:
    """Return what the model takes; its tokens are all that it reads."""
    nothing = torch.zeros_like(token_ids, dtype=torch.float32)
    return MEDSTorchBatch(
        code=token_ids, numeric_value=nothing, numeric_value_mask=nothing.bool(), time_delta_days=nothing
    )


def collate(records: list[dict[str, Any]]) -> MEDSTorchBatch:
    """Return a batch of whole records."""
    return batch_of(pad(records)["token_ids"])


def train(model: Model, records: Records) -> None:
    """Train for two steps, and then measure an epoch of the package's Lightning module."""
    sizes = records.sizes
    metrics = NextCodeMetrics(
        top_k=[k for k in (1, 2, 5, 25, 50, 100) if k < sizes["vocab_size"]], vocab_size=sizes["vocab_size"]
    )
    optimizer = partial(torch.optim.AdamW, lr=sizes["learning_rate"], weight_decay=0.01)
    module = MEICARModule(model=model, metrics=metrics, optimizer=optimizer)
    loader = DataLoader(records, batch_sampler=[batch.tolist() for batch in records.batches], collate_fn=collate)

    def trainer(limit: int | None) -> lightning.Trainer:
        return lightning.Trainer(
            max_epochs=1,
            limit_train_batches=limit,
            accelerator=sizes["device"],
            precision=sizes["precision"],
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    trainer(2).fit(module, loader)
    measured = trainer(None)
    took = seconds(lambda: measured.fit(module, loader))
    n_trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    say(
        took,
        records.n_events,
        peer=peer(),
        n_trained=n_trained,
        loss=float(measured.callback_metrics["train/loss_epoch"]),
    )


def generate(model: Model, records: Records) -> None:
    """Measure futures of full-length prompts of random tokens, as benchmarks/generation_cache.py draws them."""
    sizes = records.sizes
    prompts = torch.randint(2, sizes["vocab_size"], (sizes["n_prompts"], sizes["prompt"]))
    batch = batch_of(prompts.repeat_interleave(sizes["n_futures"], 0))
    model.eval()
    dtype = torch.bfloat16 if sizes["precision"].startswith("bf16") else torch.float32
    drawn = []

    def work() -> None:
        with torch.inference_mode(), torch.autocast(sizes["device"], dtype, enabled=dtype != torch.float32):
            drawn.append(model.generate(batch, max_new_tokens=sizes["new"]))

    model.HF_model.generation_config.eos_token_id = model.HF_model_config.eos_token_id = sizes["vocab_size"] - 1
    took = seconds(work)
    say(took, int((drawn[-1] != 0).sum()), peer=peer(), n_asked=sizes["new"] * len(batch.code))


def peer() -> str:
    """Return the versions."""
    return ", ".join(
        f"{name} {metadata.version(name)}" for name in ("meds-eic-ar", "transformers", "lightning", "torch")
    )


def main() -> None:
    """Build the model, and train or generate."""
    records, what = Records(sys.argv[1]), sys.argv[2]
    sizes = records.sizes
    torch.manual_seed(0)
    shape = {
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["n_heads"],
        "hidden_size": sizes["model_dim"],
        "intermediate_size": 4 * sizes["model_dim"],
        "max_position_embeddings": max(sizes["context"], sizes["prompt"] + sizes["new"]) + 1,
        "vocab_size": sizes["vocab_size"],
    }
    model = Model(shape, precision=sizes["precision"])
    {"train": train, "generate": generate}[what](model, records)


if __name__ == "__main__":
    main()
