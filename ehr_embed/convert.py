"""Convert a corpus of the original pipeline to a MEDS dataset, which later runs read with data=meds.

    python -m ehr_embed.convert data=tokenized data.data_dir=DIR data.vocab_filepath=FILE data.labels_filepath=FILE data.root=OUT
    python -m ehr_embed.convert data=patient_files data.data_dir=DIR data.root=OUT
    python train.py data=meds data.root=OUT

With checkpoint=OLD.pt and output=RUN it makes the folder of a run of a checkpoint, from which predict, explain and init_from go on:

    python -m ehr_embed.convert checkpoint=OLD.pt output=RUN data=patient_files data.data_dir=DIR

The command accepts every override of embed.py. `data=tokenized` and `data=patient_files` convert in the same way, but into their
cache.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from ehr_embed.core.errors import UserError
from ehr_embed.experiment.cli import CONF, run_main


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="convert")
def main(cfg: DictConfig) -> None:
    """Write the dataset and report its contents."""
    # Imported here, so that a misspelt override is refused before torch is loaded.
    from ehr_embed.experiment.inputs import convert

    if cfg.checkpoint is not None:
        from ehr_embed.experiment.original_checkpoint import convert_checkpoint

        if cfg.output is None:
            raise UserError("output is not set: expected the folder of the run that is written. Type: output=RUN")
        print(f"run {convert_checkpoint(cfg)}")
        return
    if "data_dir" not in cfg.data:
        raise UserError(
            "this data is MEDS already. Expected a corpus in another format. "
            "Type: python -m ehr_embed.convert data=tokenized data.data_dir=DIR data.root=OUT, or data=patient_files"
        )
    if cfg.data.root is None:
        raise UserError("data.root is not set: expected the folder the MEDS dataset is written to. Type: data.root=OUT")
    convert(cfg)


if __name__ == "__main__":
    run_main(main, "convert")
