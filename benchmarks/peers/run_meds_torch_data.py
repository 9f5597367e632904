"""An epoch of meds-torch-data's batches; benchmarks/batches.py runs it with the Python of an environment that has it.

PYTHON benchmarks/peers/run_meds_torch_data.py TENSORS BATCH_SIZE MAX_LENGTH
"""

import json
import sys
import time
from importlib import metadata

from meds_torchdata import MEDSPytorchDataset, MEDSTorchDataConfig
from torch.utils.data import DataLoader


def main() -> None:
    """Build every batch twice and print the second pass."""
    tensors, batch_size, max_length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = MEDSTorchDataConfig(
        tensorized_cohort_dir=tensors,
        max_seq_len=max_length,
        seq_sampling_strategy="to_end",
        static_inclusion_mode="omit",
    )
    dataset = MEDSPytorchDataset(config, split="train")
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, collate_fn=dataset.collate)
    for _ in range(2):
        began, cpu_began, n_samples, n_events = time.perf_counter(), time.process_time(), 0, 0
        for batch in loader:
            n_samples += len(batch.code)
            n_events += int((batch.code != 0).sum())
        took, cpu_took = time.perf_counter() - began, time.process_time() - cpu_began
    version = metadata.version("meds-torch-data")
    found = {"seconds": took, "cpu_seconds": cpu_took, "n_samples": n_samples, "n_events": n_events}
    print(json.dumps(found | {"peer": f"meds-torch-data {version}"}))


if __name__ == "__main__":
    main()
