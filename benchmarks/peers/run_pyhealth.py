"""An epoch of PyHealth's Transformer and Trainer; benchmarks/peers runs it with the Python of an environment that has it.

PYTHON benchmarks/peers/run_pyhealth.py RECORDS

The records become PyHealth samples with one list of codes and a binary label. Its batches are random, in float32.
"""

import sys
import tempfile
from importlib import metadata
from unittest.mock import MagicMock

import torch
from records import Records, say, seconds

# PyHealth's models of images import torchvision, whose build in the package index cannot be loaded beside a torch without CUDA.
sys.modules |= {name: MagicMock() for name in ("torchvision", "torchvision.models", "torchvision.transforms")}

from pyhealth.datasets import SampleEHRDataset, get_dataloader  # noqa: E402
from pyhealth.models import Transformer  # noqa: E402
from pyhealth.trainer import Trainer  # noqa: E402


def main() -> None:
    """Train for two steps, and then measure an epoch."""
    records = Records(sys.argv[1])
    sizes = records.sizes
    torch.manual_seed(0)
    samples = [
        {
            "patient_id": f"p{number}",
            "visit_id": f"v{number}",
            "codes": [f"c{token}" for token in records[number]["token_ids"].tolist()],
            "label": int(records.labels[number]),
        }
        for number in range(len(records))
    ]
    dataset = SampleEHRDataset(samples=samples, dataset_name="benchmark")
    model = Transformer(
        dataset=dataset,
        feature_keys=["codes"],
        label_key="label",
        mode="binary",
        embedding_dim=sizes["model_dim"],
        heads=sizes["n_heads"],
        num_layers=sizes["layers"],
        dropout=sizes["dropout"],
    )
    loader = get_dataloader(dataset, batch_size=sizes["batch_size"], shuffle=True)
    optimizer = {"lr": sizes["learning_rate"]}

    def epoch(steps: int | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Trainer(model=model, device=sizes["device"], enable_logging=False, output_path=folder).train(
                train_dataloader=loader,
                epochs=1,
                steps_per_epoch=steps,
                optimizer_class=torch.optim.AdamW,
                optimizer_params=optimizer,
                max_grad_norm=1.0,
                load_best_model_at_last=False,
            )

    epoch(2)
    took = seconds(lambda: epoch(None))
    n_trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("pyhealth", "torch"))
    say(took, records.n_events, peer=versions, n_trained=n_trained)


if __name__ == "__main__":
    main()
