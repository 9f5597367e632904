"""A run that was stopped goes on as if it had not been, bit for bit on a CPU; what must not go on is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from filelock import FileLock

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import file_sha256, read_json
from ehr_embed.core.stopping import REQUEUE, Stopped, stop_requests
from ehr_embed.data.store import EventStore
from ehr_embed.embedders.hashing import HashingEmbedder
from ehr_embed.experiment.inputs import embed
from ehr_embed.experiment.run import run
from ehr_embed.run_folder.resume import differences
from ehr_embed.training import state as training_state
from tests.helpers.configs import composed
from tests.helpers.overrides import last_of_each
from tests.helpers.refusals import refused
from tests.helpers.small_meds import ROOT
from tests.helpers.stopped_runs import (
    SHORT,
    SMALL,
    after_steps,
    dataset,  # noqa: F401 (fixtures)
    latest_step,
    settings,
    terminate,
    what_is_left,
)

KINDS = {
    "plateau": ("trainer.schedule=plateau", "trainer.scheduler_patience=0", "trainer.learning_rate=1e-2"),
    "cosine and learned vectors": (
        "trainer.schedule=cosine",
        "trainer.accumulate=2",
        "embedder.trainable=residual",
    ),
    "next event": ("task=next_event", "model=decoder_small", "trainer.schedule=cosine"),
    "packed next event": ("task=next_event", "task.windows=packed", "model=decoder_small", "trainer.epochs=9"),
    "masked event": ("task=masked_event", "model=encoder_small"),
}


SLOW_KINDS = ("packed next event", "masked event")


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def test_keys_that_an_earlier_version_did_not_have_are_no_difference():
    old = {"trainer": {"epochs": 5}, "embedder": {"batch_size": 128}}
    new = {
        "trainer": {"epochs": 5, "devices": 1, "nodes": 1, "strategy": "auto", "compile": False},
        "embedder": {"batch_size": None},
    }
    assert differences(old, new) == []
    new["trainer"]["devices"] = 2
    assert differences(old, new) == ["trainer.devices was 1, now 2"]
    stages = [{"pretrain": {"trainer": trainer}} for trainer in ({"epochs": 5}, {"epochs": 5, "ema": None})]
    assert differences(*stages) == [], "nor those of a first stage"
    before = {"trainer": {"teacher": "gbm"}}  # a version whose teacher always had this many trees
    assert differences(before, {"trainer": {"teacher": "gbm", "teacher_trees": 330}}) == []
    assert differences(before, {"trainer": {"teacher": "gbm", "teacher_trees": None}}) == [
        "trainer.teacher_trees was 330, now null"
    ]
    old = {"model": {"whiten": True, "shrinkage": 100.0}}  # of a pipeline that set the model's keys themselves
    new = old | {"event_vectors": {"whiten": True, "shrinkage": 100.0}}
    assert differences(old, new) == []
    assert differences(old, new | {"model": {"whiten": False, "shrinkage": 100.0}}) == [
        "model.whiten was True, now False"
    ]


class Killed(BaseException):
    """Ends a run as kill -9 does: nothing is saved on the way out."""


def kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def uninterrupted(dataset) -> Callable[[str], dict[str, Any]]:
    """Return what an uninterrupted run of a kind leaves; each kind is run once."""
    done: dict[str, dict[str, Any]] = {}

    def find(kind: str) -> dict[str, Any]:
        if kind not in done:
            run_dir = dataset.parent / f"whole {kind}"
            run(settings(dataset, run_dir, *KINDS[kind]))
            done[kind] = what_is_left(run_dir)
        return done[kind]

    return find


@pytest.mark.parametrize("kind", ["plateau", "cosine and learned vectors", "next event", *map(slow, SLOW_KINDS)])
def test_stopped_anywhere_a_run_ends_as_if_it_had_not_been(dataset, uninterrupted, kind, tmp_path, monkeypatch):
    """Killed and stopped by turns, in the middle of an epoch and at its end, with a checkpoint every third step."""
    expected = uninterrupted(kind)
    n_steps = expected["rows"][-1]["step"]
    cfg = settings(dataset, tmp_path / "run", *KINDS[kind], "trainer.checkpoint_every=3")
    for steps, action, error in ((2, kill, Killed), (5, terminate, Stopped), (n_steps // 3, kill, Killed)):
        with monkeypatch.context() as patch:
            after_steps(patch, steps, action)
            with pytest.raises(error):
                run(cfg)
        assert not (tmp_path / "run" / "metrics.json").exists()
    run(cfg)
    assert what_is_left(tmp_path / "run") == expected


@pytest.mark.parametrize("place", ["before the best is kept", "before the row is logged", "in the evaluation"])
def test_killed_between_two_writes(dataset, uninterrupted, place, tmp_path, monkeypatch, caplog):
    expected = uninterrupted("plateau")
    cfg = settings(dataset, tmp_path / "run", *KINDS["plateau"])
    with monkeypatch.context() as patch:
        if place == "before the best is kept":
            patch.setattr(training_state, "link_file", lambda *_: kill())
        elif place == "before the row is logged":
            patch.setattr("ehr_embed.trackers.jsonl.JsonlTracker.log", lambda *_, **__: kill())
        else:
            patch.setattr("ehr_embed.tasks.classification.Classification.fit_thresholds", lambda *_: kill())
        with pytest.raises(Killed):
            run(cfg)
    run(cfg)
    assert what_is_left(tmp_path / "run") == expected


def test_stopped_in_the_evaluation_of_an_epoch(dataset, uninterrupted, tmp_path, monkeypatch):
    """No step comes for a while: the run is saved and left at once, and goes on with the evaluation."""
    expected = uninterrupted("next event")
    cfg = settings(dataset, tmp_path / "run", *KINDS["next event"], "trainer.checkpoint_every=null")
    from ehr_embed.training.trainer import Trainer

    predict = Trainer.evaluate

    def interrupted(self, model, embedding, split, stop=None):
        terminate()
        return predict(self, model, embedding, split, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", interrupted)
        with pytest.raises(Stopped, match=r"SIGTERM in epoch 1, step \d+.*/run;"):
            run(cfg)
    progress = torch.load(tmp_path / "run" / "latest_checkpoint.pt", weights_only=True)["progress"]
    assert progress["batch"] == progress["step"] > 0
    run(cfg)
    assert what_is_left(tmp_path / "run") == expected


def test_a_resumed_run_still_says_what_its_weights_started_from(dataset, tmp_path, monkeypatch):
    first = settings(dataset, tmp_path / "first", "trainer.epochs=1")
    run(first)
    start = tmp_path / "start.pt"
    start.write_bytes((tmp_path / "first" / "best_checkpoint.pt").read_bytes())
    cfg = settings(dataset, tmp_path / "run", f"init_from={start}")
    with monkeypatch.context() as patch:
        after_steps(patch, 3, terminate)
        with pytest.raises(Stopped):
            run(cfg)
    expected = file_sha256(start)
    start.unlink()
    run(cfg)
    assert read_json(tmp_path / "run" / "manifest.json")["made_from"]["init_from_sha256"] == expected


def test_a_run_that_an_earlier_version_stopped_goes_on(dataset, uninterrupted, tmp_path, monkeypatch):
    """Its checkpoint has the sum of the batches' mean losses and no count; only that epoch's train loss may differ."""
    expected = uninterrupted("plateau")
    cfg, latest = settings(dataset, tmp_path / "run", *KINDS["plateau"]), tmp_path / "run" / "latest_checkpoint.pt"
    with monkeypatch.context() as patch:
        after_steps(patch, 3, terminate)
        with pytest.raises(Stopped):
            run(cfg)
    checkpoint = torch.load(latest, weights_only=True)
    progress = checkpoint["progress"]
    assert progress["batch"] == 3
    progress["loss_sum"] *= 3 / progress.pop("loss_count")
    torch.save(checkpoint, latest)
    run(cfg)
    found = what_is_left(tmp_path / "run")
    assert found["best"] == expected["best"]
    assert found["predictions"] == expected["predictions"]
    first, other = found["rows"][0], expected["rows"][0]
    assert first["train/loss"] == pytest.approx(other["train/loss"], rel=0.2)
    assert first | {"train/loss": 0} == other | {"train/loss": 0}


def test_a_kill_loses_at_most_checkpoint_every_steps(dataset, tmp_path, monkeypatch, caplog):
    cfg = settings(dataset, tmp_path / "run", "trainer.checkpoint_every=3", "trainer.epochs=9")
    for taken in (4, 5, 11):
        before = latest_step(tmp_path / "run")
        with monkeypatch.context() as patch:
            after_steps(patch, taken, kill)
            with pytest.raises(Killed):
                run(cfg)
        assert 0 <= before + taken - latest_step(tmp_path / "run") <= 3
    caplog.clear()
    with caplog.at_level("INFO"):
        run(cfg)
    assert re.search(r"continuing .*run at epoch \d, (batch \d+|its end) \(step \d+\)", caplog.text)


def test_batches_that_were_trained_on_are_not_built_again(dataset, tmp_path, monkeypatch):
    from ehr_embed.data.batches import BatchDataset

    cfg = settings(dataset, tmp_path / "run", "trainer.epochs=1", "trainer.checkpoint_every=1")
    built: list[int] = []
    get = BatchDataset.__getitem__

    def seen(self, index):
        built.append(len(index))
        return get(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(BatchDataset, "__getitem__", seen)
        after_steps(patch, 6, terminate)
        with pytest.raises(Stopped):
            run(cfg)
        first, built[:] = sum(built), []
        run(cfg)
    assert 5 * 16 < first <= 6 * 16
    assert sum(built) == (120 - first) + 2 * 120 + 120, "the rest of train, tuning twice, held_out"


def test_a_finished_run_is_left_as_it_is(dataset, tmp_path, caplog):
    cfg = settings(dataset, tmp_path / "run", "trainer.epochs=1")
    value = run(cfg)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with caplog.at_level("INFO"):
        assert run(cfg) == value
    assert "is finished already" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    harmless = ("trainer.num_workers=1", "trainer.data_device=device")
    assert run(settings(dataset, tmp_path / "run", "trainer.epochs=1", *harmless)) == value


@pytest.fixture
def stopped(dataset, tmp_path, monkeypatch) -> Path:
    """A run stopped in the middle of its second epoch."""
    with monkeypatch.context() as patch:
        after_steps(patch, 11, terminate)
        with pytest.raises(Stopped):
            run(settings(dataset, tmp_path / "run"))
    return tmp_path / "run"


def test_other_settings_are_refused_with_both_values_and_the_way_on(dataset, stopped, tmp_path):
    changed = settings(dataset, stopped, "trainer.learning_rate=0.5", "seed=3", "trainer.checkpoint_every=7")
    before = (stopped / "latest_checkpoint.pt").read_bytes()
    message = (
        r"run .*: seed was 0, now 3; task\.fraction_seed was 0, now 3; "
        r"trainer\.learning_rate was 0\.0001, now 0\.5\. "
        r".*resume=force; .*: seed=0 task\.fraction_seed=0 trainer\.learning_rate=0\.0001; "
        r".*resume=overwrite; .*run_dir=ANOTHER"
    )
    with pytest.raises(UserError, match=message):
        run(changed)
    assert (stopped / "latest_checkpoint.pt").read_bytes() == before
    with pytest.raises(UserError, match=r"unknown resume 'forc': did you mean 'force'"):
        run(settings(dataset, stopped, "resume=forc"))


def test_force_goes_on_with_the_new_settings(dataset, stopped):
    force = ("resume=force", "trainer.learning_rate=0.5", "trainer.epochs=4", "trainer.schedule=cosine")
    run(settings(dataset, stopped, *force))
    rows = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    rates = [row["train/learning_rate"] for row in rows]
    assert rates[0] == pytest.approx(1e-4)
    assert 0.1 < rates[1] < 0.5
    assert rates[3] == pytest.approx(1e-6, rel=0.1), "the new schedule ends where the new epochs end"
    assert "resume: force" in (stopped / "config.yaml").read_text()
    more = settings(dataset, stopped, *force, "trainer.epochs=5", "trainer.patience=50")
    run(more)
    assert read_json(stopped / "metrics.json")["train"]["epochs"] == 5, "a finished run goes on too"


def test_force_cannot_change_what_the_weights_are(dataset, stopped):
    with refused("latest_checkpoint.pt", "resume=overwrite"):
        run(settings(dataset, stopped, "resume=force", "model.model_dim=32"))


def test_overwrite_starts_again(dataset, stopped, uninterrupted):
    cfg = settings(dataset, stopped, *KINDS["plateau"], "resume=overwrite")
    run(cfg)
    assert what_is_left(stopped) == uninterrupted("plateau")


def test_other_labels_are_refused(dataset, stopped):
    path = dataset / "labels" / "good" / "0.parquet"
    before = path.read_bytes()
    try:
        pl.read_parquet(path).with_columns(pl.col("boolean_value").reverse()).write_parquet(path)
        with pytest.raises(UserError, match=r"labels had digest \w+, now \w+.*Type: run_dir=ANOTHER"):
            run(settings(dataset, stopped, "resume=force"))
    finally:
        path.write_bytes(before)


def test_two_processes_do_not_share_a_folder(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("ehr_embed.run_folder.resume.CLAIM_TIMEOUT_S", 0)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(UserError, match=r"/run: .*type: run_dir=ANOTHER"):
        run(settings(dataset, tmp_path / "run"))


def test_a_finished_stage_is_not_repeated(dataset, tmp_path, monkeypatch):
    stages = ("experiment=pretrain_then_finetune", "model=decoder_small", "pretrain.trainer.epochs=1")
    small = ("pretrain.trainer.n_bootstrap=0", "pretrain.trainer.precision=32-true", "pretrain.trainer.batch_size=16")
    cfg = settings(dataset, tmp_path / "run", *stages, *small, "trainer.epochs=1")
    with monkeypatch.context() as patch:
        after_steps(patch, 12, terminate)
        with pytest.raises(Stopped, match=r"\S*/run; the same command"):
            run(cfg)
    pretrained = tmp_path / "run" / "pretrain" / "latest_checkpoint.pt"
    before = pretrained.stat().st_mtime_ns
    run(cfg)
    assert pretrained.stat().st_mtime_ns == before
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("place", ["store", "embedding"])
def test_stopped_while_preparing(dataset, tmp_path, monkeypatch, place):
    """On the spot; nothing half-written stays, and what a batch of texts cost is kept."""
    arguments = ("data=meds", f"data.root={dataset}", "data.min_count=1", "embedder=hashing", "embedder.batch_size=4")
    cfg = composed(*arguments, f"cache_dir={tmp_path / 'cache'}", name="embed")
    embedded: list[str] = []
    whole = HashingEmbedder.embed

    def embed_and_stop(self, texts):
        embedded.extend(texts)
        if len(embedded) == 8:
            terminate()
        return whole(self, texts)

    monkeypatch.setattr(HashingEmbedder, "embed", embed_and_stop)
    with monkeypatch.context() as patch:
        if place == "store":
            patch.setattr("ehr_embed.data.store._SplitWriter.finish", lambda *_: terminate())
        with pytest.raises(Stopped, match=r"SIGTERM; .*the same command continues"):
            embed(cfg)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not [path for path in left if ".tmp" in str(path)]
    assert any(path.name == "manifest.json" for path in left) == (place == "embedding")
    embedded.clear()
    monkeypatch.setattr(HashingEmbedder, "embed", lambda self, texts: embedded.extend(texts) or whole(self, texts))
    embed(cfg)
    n_texts = len(open_store(tmp_path).vocabulary) - 1
    assert len(embedded) == len(set(embedded)) == (n_texts if place == "store" else n_texts - 4)


def open_store(folder: Path) -> EventStore:
    (manifest,) = folder.glob("cache/stores/*/manifest.json")
    return EventStore(manifest.parent)


def test_handlers_of_others_stay():
    """submitit and a search have their own way with signals."""
    before = signal.signal(signal.SIGTERM, own := lambda number, frame: None)
    try:
        with stop_requests(is_deferred=False):
            assert signal.getsignal(signal.SIGTERM) is own
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_ctrl_c_waits_for_nothing():
    with stop_requests(is_deferred=True) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGINT"
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT), slow(signal.SIGUSR1)])
def test_a_process_that_is_asked_to_stop_can_be_requeued(dataset, tmp_path, number):
    arguments = ["data=meds", f"data.root={dataset}", f"cache_dir={dataset.parent / 'cache'}", "run_dir=run", *SMALL]
    arguments += [option for option in SHORT if not option.startswith("trainer.epochs=")]
    arguments += ["trainer.epochs=500", "trainer.patience=500", "trainer.checkpoint_every=null"]
    command = [sys.executable, str(ROOT / "train.py"), *last_of_each(arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "latest_checkpoint.pt").exists():
        assert time.monotonic() < deadline, "waited in vain"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == REQUEUE == 75, output
    assert re.search(rf"stopped by {number.name} in epoch \d+, step \d+, and saved in run; the same command", output)
    assert "Traceback" not in output
    assert read_json(tmp_path / "run" / "summary.json")["state"] == "stopped"
    said = int(re.search(r"step (\d+), and saved", output)[1])  # type: ignore[index]
    assert latest_step(tmp_path / "run") == said
    assert not list((tmp_path / "run").rglob("*.tmp"))
