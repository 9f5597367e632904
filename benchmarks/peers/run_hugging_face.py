"""An epoch of the Hugging Face Trainer; benchmarks/peers runs it with the Python of an environment that has transformers.

PYTHON benchmarks/peers/run_hugging_face.py RECORDS WAY

WAY: `same` = the batches and the precision of `python -m benchmarks.peers`; `defaults` = the Trainer's own, random batches
padded to the longest, in float32. The model is BERT of the same sizes, with random weights, above the same frozen vectors of
tokens, without dropout on attention weights.
"""

import sys
import tempfile
from importlib import metadata
from typing import Any, cast

import torch
from records import Records, pad, say, seconds
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments


def model_of(sizes: dict[str, Any], table: torch.Tensor) -> BertForSequenceClassification:
    """Return BERT of these sizes, whose token vectors are frozen, normed and projected."""
    config = BertConfig(
        vocab_size=len(table),
        hidden_size=sizes["model_dim"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["n_heads"],
        intermediate_size=4 * sizes["model_dim"],
        max_position_embeddings=sizes["context"],
        hidden_dropout_prob=sizes["dropout"],
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 2
    model = BertForSequenceClassification(config)
    width = table.shape[1]
    vectors = torch.nn.Sequential(
        torch.nn.Embedding.from_pretrained(table, freeze=True),
        torch.nn.LayerNorm(width),
        torch.nn.Linear(width, sizes["model_dim"]),
    )
    setattr(model.bert.embeddings, "word_embeddings", vectors)  # noqa: B010 (its type is another one)
    return model


def collate(records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch under the names that BERT knows."""
    batch = pad(records)
    return {"input_ids": batch["token_ids"], "attention_mask": batch["mask"], "labels": batch["labels"]}


class SameBatches(Trainer):
    """A Trainer that takes the given batches."""

    def get_train_dataloader(self) -> DataLoader:
        records = cast("Records", self.train_dataset)
        return DataLoader(
            cast("Any", records), batch_sampler=[batch.tolist() for batch in records.batches], collate_fn=collate
        )


def main() -> None:
    """Train for a few steps, and then measure an epoch."""
    records, way = Records(sys.argv[1]), sys.argv[2]
    sizes = records.sizes
    torch.manual_seed(0)
    model = model_of(sizes, records.table)
    is_same = way == "same"
    with tempfile.TemporaryDirectory() as folder:

        def trainer(max_steps: int) -> Trainer:
            settings = TrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                max_steps=max_steps,
                per_device_train_batch_size=sizes["batch_size"],
                learning_rate=sizes["learning_rate"],
                bf16=is_same and sizes["precision"].startswith("bf16"),
                use_cpu=sizes["device"] == "cpu",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
                remove_unused_columns=False,
            )
            kind = SameBatches if is_same else Trainer
            return kind(model=model, args=settings, train_dataset=records, data_collator=collate)

        trainer(2).train()
        measured = trainer(-1)
        took = seconds(measured.train)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("transformers", "torch"))
    n_parameters = sum(x.numel() for x in model.parameters() if x.requires_grad)
    say(
        took, records.n_events, peer=versions, n_trained=n_parameters, loss=measured.state.log_history[-1]["train_loss"]
    )


if __name__ == "__main__":
    main()
