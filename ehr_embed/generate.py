"""`python -m ehr_embed.generate`: sample futures of subjects from a run of task=next_event, and write them as MEDS events."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from ehr_embed.config.check import checks_config
from ehr_embed.core.threads import AUTO, use_threads
from ehr_embed.experiment.cli import CONF, run_main


@checks_config("GenerateKeys")
def generate_trajectories(cfg: DictConfig) -> list[Path]:
    """Sample futures as `cfg` (conf/generate.yaml) says, and write one file per future number, with all prompts in each.

    Returns:
        The paths of the files.

    Raises:
        UserError: the run cannot generate events, the split or a stop code is unknown, the horizon is 0, or the prompt leaves
            no room for new events.
    """
    # Imported here, so that a misspelt override is refused before torch is loaded.
    from ehr_embed.data.batches import BatchDataset
    from ehr_embed.data.event_set import EventSet
    from ehr_embed.data.store import encode_split
    from ehr_embed.inference.trained_run import device_named, open_run, samples_to_predict, trained_on
    from ehr_embed.inference.trajectories import earlier_futures, sample_futures, write_futures
    from ehr_embed.models.sampling import Sampling, check_generates, check_lengths
    from ehr_embed.sources.meds import MedsSource

    trusted, device = tuple(cfg.trusted_packages), device_named(cfg.device)
    use_threads(cfg.get("threads", AUTO), device=device.type)
    run = open_run(cfg.run, trusted=trusted)
    max_length = check_generates(run.model).body.max_length
    earlier_futures(Path(cfg.output) / cfg.split)  # refuse a folder with other files now, not after hours of sampling
    sampling = Sampling(
        n_samples=cfg.n_samples,
        horizon_days=cfg.horizon_days,
        max_new_events=cfg.max_new_events,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        stop_tokens=EventSet(codes=cfg.stop_codes).tokens(run.vocabulary),
    )
    prompt_length = max_length - cfg.max_new_events if cfg.prompt_length is None else cfg.prompt_length
    check_lengths(prompt_length, cfg.max_new_events, max_length)
    source = trained_on(run, trusted=trusted) if cfg.data.root is None else MedsSource(root=cfg.data.root)
    events = encode_split(source, run.vocabulary, cfg.split)
    samples = samples_to_predict(events, cfg.labels, source.labels_dir, max_length=prompt_length)
    futures = sample_futures(
        run,
        BatchDataset(events, samples),
        sampling,
        device=device,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        use_cache=cfg.use_cache,
    )
    paths = write_futures(futures, Path(cfg.output) / cfg.split, n_samples=sampling.n_samples)
    print(f"{len(paths)} files in {paths[0].parent}")
    return paths


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="generate")
def main(cfg: DictConfig) -> None:
    """Run the command line."""
    generate_trajectories(cfg)


if __name__ == "__main__":
    run_main(main, "generate")
