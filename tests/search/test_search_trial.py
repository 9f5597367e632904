"""The trial handle: silent outside a search, and one decision for all ranks inside."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing

from ehr_embed.config.instantiate import instantiate
from ehr_embed.search.trial import NoTrial, StudyTrial, current_trial


def bad_trial() -> optuna.Trial:
    """A trial that every pruner with a threshold stops at its first report."""
    return optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=1.0)).ask()


def test_outside_a_search_nothing_happens(monkeypatch):
    monkeypatch.delenv("EHR_EMBED_TRIAL", raising=False)
    trial = current_trial(instantiate)
    assert isinstance(trial, NoTrial)
    trial.report(float("nan"), step=1)


def test_a_report_is_stored_and_prunes():
    stored = bad_trial()
    trial = StudyTrial(lambda: stored)
    trial.report(0.5, step=1)
    with pytest.raises(optuna.TrialPruned, match="step 2"):
        trial.report(2.0, step=2)
    assert stored.study.trials[0].intermediate_values == {1: 0.5, 2: 2.0}


def refuse() -> optuna.Trial:
    raise AssertionError("only rank 0 may speak with the storage")


def report_on_rank(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    trial = StudyTrial(bad_trial if rank == 0 else refuse)
    trial.report(0.5, step=1)
    try:
        # Rank 1 has another number before it; the decision is rank 0's.
        trial.report(2.0 if rank == 0 else 0.0, step=2)
    except optuna.TrialPruned:
        Path(folder, f"pruned{rank}").touch()
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed package")
def test_all_ranks_leave_together(tmp_path):
    assert torch.distributed.is_gloo_available()
    multiprocessing.spawn(report_on_rank, args=(str(tmp_path),), nprocs=2)
    assert sorted(path.name for path in tmp_path.glob("pruned*")) == ["pruned0", "pruned1"]
