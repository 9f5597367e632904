"""Prepare a dataset: vocabulary, event store and embedding table; `python embed.py --help` lists groups and keys."""

import hydra
from omegaconf import DictConfig

from ehr_embed.cli import run_main
from ehr_embed.experiment import prepare_from
from ehr_embed.prepare import report


@hydra.main(version_base="1.3", config_path="conf", config_name="embed")
def main(cfg: DictConfig) -> None:
    """Build what is missing and say what there is."""
    _, prepared = prepare_from(cfg, overwrite=cfg.overwrite)
    report(prepared.store, cfg.data.min_text_coverage)
    n, width = prepared.table.shape
    print(f"store {prepared.store.folder}\ntable {prepared.table_path} ({n} x {width}, digest {prepared.table_digest})")


if __name__ == "__main__":
    run_main(main, "embed")
