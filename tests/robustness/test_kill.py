"""kill -9 at random moments: what is lost is counted, and nothing that was finished is. Each prints its count (-s)."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ehr_embed.embedding.table import load_table
from ehr_embed.search.study import DISCARDED
from tests.helpers.search_app.run import counted, distinct, states, trials_of
from tests.helpers.stopped_runs import latest_step, what_is_left
from tests.helpers.watched_runs import (
    Watched,
    cached,
    many_texts,  # noqa: F401 (fixtures)
)

N_KILLS = int(os.environ.get("EHR_EMBED_KILLS", "20"))
SMALL = ("embedder=hashing", "data.n_subjects=300", "model.n_layers=1", "model.model_dim=16", "trainer.n_bootstrap=20")
SLOW = ("trainer.epochs=24", "trainer.patience=99", "trainer.batch_size=4", "trainer.precision=32-true")
EVERY = 20


def stamps(folder: Path, *patterns: str) -> dict[str, tuple[int, int]]:
    """Return inode and time of the files that match: a file that was written again has others.

    A file in a folder that is still being written is not finished, and may go; pathlib's `*` matches its hidden name too.
    """
    found = [
        path
        for pattern in patterns
        for path in folder.glob(pattern)
        if not any(part.startswith(".") or part.endswith(".tmp") for part in path.relative_to(folder).parts)
    ]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def n_lost(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Finished things that are gone or were made again."""
    return sum(after.get(name) != stamp for name, stamp in before.items())


@pytest.mark.slow
def test_killed_while_training(tmp_path, capsys):
    rng = random.Random(0)
    arguments = ("train.py", "run_dir=run", *SMALL, *SLOW, f"trainer.checkpoint_every={EVERY}")
    Watched(*arguments[:1], *[a.replace("=run", "=whole") for a in arguments[1:]], cwd=tmp_path).finish()
    finished = ("cache/stores/*/manifest.json", "cache/stores/*/*.safetensors", "run/checkpoint_epoch_*.pt")
    run, steps, artefacts, n_kills, n_steps = tmp_path / "run", [], 0, 0, 0
    while n_kills < N_KILLS:
        start, before = latest_step(run), stamps(tmp_path, *finished)
        process = Watched(*arguments, cwd=tmp_path)
        process.wait_for(lambda process=process: process.count("s") > 0)
        time.sleep(rng.uniform(0, 0.3))
        assert process.kill(), f"finished after {n_kills} kills: give it more epochs"
        n_kills, taken = n_kills + 1, process.count("s")
        n_steps += taken
        steps.append(start + taken - latest_step(run))
        artefacts += n_lost(before, stamps(tmp_path, *finished))
    output = Watched(*arguments, cwd=tmp_path).finish()
    assert "continuing run at epoch" in output
    again = Watched(*arguments, cwd=tmp_path)
    assert "is finished already" in again.finish()
    assert again.count("s") == 0
    with capsys.disabled():
        print(
            f"\ntraining: {n_kills} kills in {n_steps} steps, {sum(steps)} steps lost, at most {max(steps)} a kill "
            f"(checkpoint_every={EVERY}), {artefacts} finished artefacts lost"
        )
    assert 0 <= min(steps) <= max(steps) <= EVERY
    assert artefacts == 0
    assert not list(run.rglob("*.tmp"))
    assert what_is_left(run) == what_is_left(tmp_path / "whole")


@pytest.mark.slow
def test_killed_while_building_and_embedding(many_texts, tmp_path, capsys):
    rng = random.Random(1)
    arguments = ("embed.py", "data=meds", f"data.root={many_texts}", "data.min_count=1", "embedder=hashing")
    arguments += ("embedder.batch_size=8",)
    finished = ("cache/stores/*/manifest.json", "cache/stores/*/*.safetensors")
    n_kills, artefacts, vectors, n_embedded, places, n_rounds = 0, 0, 0, 0, [0, 0], 0
    whole = Watched(*arguments, "cache_dir=whole", cwd=tmp_path)
    whole.wait_for(lambda: whole.count("p") > 0)
    began = time.monotonic()
    whole.wait_for(lambda: any(tmp_path.glob("whole/stores/*/manifest.json")))
    store_seconds = time.monotonic() - began
    whole.finish()
    seconds = time.monotonic() - began
    while n_kills < N_KILLS:
        before, n_before = stamps(tmp_path, *finished), cached(tmp_path)
        process = Watched(*arguments, cwd=tmp_path)
        process.wait_for(lambda process=process: process.count("p") > 0)
        has_store = any("manifest" in name for name in before)
        # Half of the kills aim at the store, which is made in a small part of the time.
        is_aimed = not has_store and n_kills % 2 == 0
        time.sleep(rng.uniform(0, store_seconds if is_aimed else seconds))
        was_killed = process.kill()
        n_embedded += process.count("t")
        after = stamps(tmp_path, *finished)
        artefacts += n_lost(before, after)
        vectors += max(0, n_before + process.count("t") - 8 - cached(tmp_path))
        if was_killed:
            n_kills += 1
            places[any("manifest" in name for name in after)] += 1
        # All is there, or a store is that the next kill is to hit: from the start, in another cache.
        if not was_killed or len(after) == 2 or (after and n_kills % 2 == 0):
            n_rounds += 1
            assert not list(tmp_path.glob("cache/stores/*/.*.tmp"))
            (tmp_path / "cache").rename(tmp_path / f"cache-{n_rounds}")
    Watched(*arguments, cwd=tmp_path).finish()
    with capsys.disabled():
        print(
            f"\npreparing: {n_kills} kills, {places[0]} before a store was whole and {places[1]} after, {n_embedded} "
            f"texts embedded; lost: {vectors} vectors beyond the batch at hand, {artefacts} finished stores or tables"
        )
    assert artefacts == vectors == 0
    assert min(places) >= N_KILLS // 5, "the kills came all in one place"
    assert not list(tmp_path.glob("cache/stores/**/*.tmp"))
    for path in (tmp_path / "whole" / "stores").rglob("*"):
        other = tmp_path / "cache" / path.relative_to(tmp_path / "whole")
        if path.suffix == ".safetensors":  # whose header has no order
            assert torch.equal(load_table(path, expected={})[0], load_table(other, expected={})[0])
        elif path.is_file() and path.suffix != ".lock":
            assert path.read_bytes() == other.read_bytes(), path


@pytest.mark.slow
def test_killed_while_searching(tmp_path, capsys):
    rng = random.Random(2)
    rates = ",".join(f"{1 + i}e-3" for i in range(8))
    arguments = ("train.py", "-m", "hydra/sweeper=study", "hydra/sweeper/sampler=grid", "hydra/sweeper/pruner=none")
    arguments += ("hydra.sweeper.study_name=app", "hydra.sweeper.has_plots=false", "hydra.sweeper.n_jobs=2")
    arguments += (f"trainer.learning_rate={rates}", *SMALL, *SLOW)
    finished = ("multirun/app/*/metrics.json", "multirun/app/*/outcome.json")
    n_kills, n_finished, n_rounds, artefacts, done = 0, 0, 0, 0, set()
    folder = tmp_path / "multirun" / "app"
    while n_kills < N_KILLS:
        before = stamps(tmp_path, *finished)
        began = time.time()
        process = Watched(*arguments, cwd=tmp_path)
        # The search is killed by turns after a trial has begun, after one has a checkpoint, and after one has finished, so that the
        # speed of the machine does not decide which is hit.
        sign = ("log.txt", "latest_checkpoint.pt", "metrics.json")[n_kills % 3]
        process.wait_for(
            lambda sign=sign, began=began: any(p.stat().st_mtime > began for p in folder.glob(f"*/{sign}")), seconds=600
        )
        time.sleep(rng.uniform(0, 2))
        was_killed = process.kill()
        time.sleep(0.7)  # its jobs see that it is gone, and end
        artefacts += n_lost(before, stamps(tmp_path, *finished))
        now = {trial.number for trial in trials_of(tmp_path) if trial.state.name == "COMPLETE"}
        artefacts += len(done - now)
        n_finished += len(now - done)
        done, n_kills = now, n_kills + was_killed
        if not was_killed:  # all is there: from the start, in another folder
            assert_all_told(tmp_path)
            n_rounds, done = n_rounds + 1, set()
            (tmp_path / "multirun").rename(tmp_path / f"multirun-{n_rounds}")
    Watched(*arguments, cwd=tmp_path).finish(seconds=900)
    trials = trials_of(tmp_path)
    told = counted(trials)
    n_again = len([trial for trial in trials if DISCARDED in trial.user_attrs])
    n_continued = sum("continuing" in path.read_text() for path in folder.glob("*/log.txt"))
    with capsys.disabled():
        print(
            f"\nsearch: {n_kills} kills in {n_rounds + 1} searches of 8 trials, {n_finished} trials finished between them, "
            f"{artefacts} of these lost; the last search: {len(told)} finished in the end, {n_again} unfinished ones given "
            f"back, {n_continued} finished ones had gone on from a checkpoint, {len(told) - distinct(told)} repeated"
        )
    assert artefacts == 0
    assert n_finished > 0, "no trial finished between the kills, so none could be lost"
    assert_all_told(tmp_path)


def assert_all_told(tmp_path: Path) -> None:
    """Each of the eight points once, with its metrics."""
    told, folder = counted(trials_of(tmp_path)), tmp_path / "multirun" / "app"
    assert states(told) == ["COMPLETE"] * 8
    assert distinct(told) == 8
    assert sorted(folder.glob("*/metrics.json")) == sorted(
        folder / str(trial.number) / "metrics.json" for trial in told
    )
