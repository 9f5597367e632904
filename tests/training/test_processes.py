"""Several processes train what one does with as many batches a step; they stop, fail and go on together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json
from ehr_embed.core.launchers import n_launched
from ehr_embed.core.stopping import REQUEUE, Stopped
from ehr_embed.experiment.run import run
from ehr_embed.run_folder.checkpoints import read_checkpoint
from ehr_embed.training import processes
from ehr_embed.training.processes import Processes, launch, run_ranks
from ehr_embed.training.settings import TrainerSettings
from ehr_embed.training.state import seed_of_rank
from ehr_embed.training.trainer import Trainer
from tests.helpers.configs import composed
from tests.helpers.overrides import last_of_each
from tests.helpers.ranks import quick_ranks  # noqa: F401 (a fixture for all)
from tests.helpers.refusals import refused
from tests.helpers.small_meds import ROOT, Event, write_meds

# Two kinds of tests start Python for each process, as a run does: test_a_process_ends_with_the_one_that_started_it, and the
# slow ones.
pytestmark = pytest.mark.usefixtures("quick_ranks")
SMALL = (
    "embedder=hashing",
    "embedder.trainable=residual",
    "model=encoder_small",
    "model.n_layers=1",
    "model.model_dim=16",
)
SHORT = ("trainer.epochs=3", "trainer.batch_size=8", "trainer.warmup_steps=3", "trainer.n_bootstrap=20")
PIPED: Any = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
MEASURED = ("_s", "_mib", "mfu", "seconds")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """64 subjects in train, 36 in the others (five batches of eight, so that one rank has more), a planted signal."""
    rng, labels = np.random.default_rng(0), []
    splits: dict[str, list[Event]] = {}
    for number, (split, n) in enumerate((("train", 64), ("tuning", 36), ("held_out", 36))):
        splits[split] = []
        for subject in range(1000 * number, 1000 * number + n):
            codes = [f"N{i}" for i in rng.integers(0, 9, rng.integers(4, 20))] + [("BAD", "GOOD")[subject % 3 == 0]]
            splits[split] += [(subject, float(day), code, None) for day, code in enumerate(rng.permutation(codes))]
            labels.append((subject, 99.0, subject % 3 == 0))
    return write_meds(tmp_path_factory.mktemp("processes") / "set", splits, labels={"good": labels})


def overrides(dataset: Path, run_dir: Path, *more: str) -> list[str]:
    place = (f"data.root={dataset}", f"cache_dir={dataset.parent / 'cache'}", f"run_dir={run_dir}")
    precise = ("trainer.precision=32-true", "trainer.learning_rate=1e-2", "model.dropout=0", "trainer.accelerator=cpu")
    return last_of_each(["data=meds", *place, *SMALL, *SHORT, *precise, *more])


def history(run_dir: Path) -> list[dict[str, Any]]:
    rows = pl.read_ndjson(run_dir / "metrics.jsonl").to_dicts()
    return [{name: x for name, x in row.items() if not name.endswith(MEASURED)} for row in rows if "train/loss" in row]


def predictions(run_dir: Path) -> Any:
    return pl.read_parquet(run_dir / "predictions" / "held_out.parquet")["predicted_boolean_probability"].to_numpy()


@pytest.fixture(scope="module")
def alone(dataset) -> Path:
    """A run of one process that sees four batches a step."""
    run_dir = dataset.parent / "alone"
    run(composed(*overrides(dataset, run_dir, "trainer.accumulate=4")))
    return run_dir


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_that_accumulate_have_the_loss_curve_of_one(dataset, alone, strategy):
    run_dir = dataset.parent / strategy
    together = ("trainer.accumulate=2", "trainer.devices=2", f"trainer.strategy={strategy}")
    objective = run(composed(*overrides(dataset, run_dir, *together)))
    expected, found = history(alone), history(run_dir)
    assert len(found) == len(expected) == 3
    for there, here in zip(expected, found, strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-6)
    assert expected[0]["train/loss"] > expected[-1]["train/loss"] + 0.01  # there was something to learn
    np.testing.assert_allclose(predictions(run_dir), predictions(alone), rtol=1e-3)
    assert objective == pytest.approx(read_json(alone / "metrics.json")["tuning"]["auroc"]["value"])

    one, several = (read_checkpoint(folder)[1] for folder in (alone, run_dir))
    for part in ("model_state_dict", "embedding_state_dict"):
        assert one[part].keys() == several[part].keys()
        for name, weights in one[part].items():
            if name.endswith("qkv.bias"):
                continue  # the keys' has no gradient but rounding, which Adam scales up
            torch.testing.assert_close(several[part][name], weights, rtol=1e-3, atol=1e-5)
    assert one["embedding_state_dict"]["learned"].abs().sum() > 0
    moments, others = one["optimizer_state_dict"]["state"], several["optimizer_state_dict"]["state"]
    assert {i: m["exp_avg"].shape for i, m in moments.items()} == {i: m["exp_avg"].shape for i, m in others.items()}
    train = read_json(run_dir / "metrics.json")["train"]
    assert train["n_parameters"] == read_json(alone / "metrics.json")["train"]["n_parameters"]
    assert train["steps"] == 6


def test_what_several_saved_one_goes_on_from(dataset, alone):
    first = ("trainer.accumulate=2", "trainer.devices=2", "trainer.strategy=fsdp", "trainer.epochs=2")
    run_dir = dataset.parent / "handed_on"
    run(composed(*overrides(dataset, run_dir, *first)))
    run(composed(*overrides(dataset, run_dir, "trainer.accumulate=4", "resume=force")))
    assert history(run_dir)[-1] == pytest.approx(history(alone)[-1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_all_and_they_go_on_bit_for_bit(dataset, strategy):
    more = ["trainer.devices=2", f"trainer.strategy={strategy}", "model.dropout=0.2", "trainer.epochs=20"]
    more += ["trainer.patience=20", "trainer.checkpoint_every=null"]
    whole, broken = (dataset.parent / f"{name}_{strategy}" for name in ("whole", "broken"))
    for run_dir in (whole, broken):
        command = [sys.executable, "train.py", *overrides(dataset, run_dir, *more)]
        process = subprocess.Popen(command, **PIPED)
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if run_dir == broken and line.startswith("epoch 2"):
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(int(children[-1]), signal.SIGTERM)  # to a rank, as a scheduler may
        code = process.wait()
        if run_dir == broken:
            assert code == REQUEUE, said
            assert "stopped by SIGTERM" in said
            assert len(history(run_dir)) < 20
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        else:
            assert code == 0, said
    for there, here in zip(history(whole), history(broken), strict=True):
        assert here == pytest.approx(there, rel=1e-6)  # the mean loss was summed in two parts
    np.testing.assert_array_equal(predictions(broken), predictions(whole))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def end_well(launched: list[subprocess.Popen[str]], folder: Path, alone: Path) -> None:
    """All end without an error, and left the run of `alone` in one folder."""
    said = [process.communicate(timeout=300)[0] for process in launched]
    assert [process.returncode for process in launched] == [0] * len(launched), said
    (run_dir,) = folder.iterdir()
    assert history(run_dir)[-1] == pytest.approx(history(alone)[-1], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_torchrun_starts_the_processes_and_they_agree_on_the_folder(dataset, tmp_path, alone):
    # A run_dir that would be another one in each process.
    more = overrides(dataset, tmp_path / "${now:%f}", "trainer.accumulate=2", "trainer.devices=1", "trainer.nodes=2")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    launchers = [
        subprocess.Popen([*command, f"--node-rank={node}", "train.py", *more], **PIPED)  # as on two machines
        for node in range(2)
    ]
    end_well(launchers, tmp_path, alone)


@pytest.mark.slow
def test_a_slurm_step_is_one_run(dataset, tmp_path, alone):
    """Its environment, as srun sets it (man srun, OUTPUT ENVIRONMENT VARIABLES); Slurm itself is not here."""
    more = overrides(dataset, tmp_path / "${now:%f}", "trainer.accumulate=2", "trainer.devices=2")
    step = {"JOB_ID": "1", "JOB_NAME": "train", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1", "NODEID": "0"}
    step |= {"STEP_NUM_TASKS": "2", "NODELIST": "localhost", "JOB_NODELIST": "localhost"}
    environment = os.environ | {f"SLURM_{name}": value for name, value in step.items()}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    tasks = [
        subprocess.Popen(
            [sys.executable, "train.py", *more],
            env=environment | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            **PIPED,
        )
        for task in range(2)
    ]
    end_well(tasks, tmp_path, alone)


def speak() -> tuple[list[int], int, list[int], list[float], str]:
    """Return what two ranks hear of each other."""
    here: Processes = TrainerSettings(accelerator="cpu", devices=2).launch()

    def fail() -> None:
        raise UserError("only rank 0 knows why")

    try:
        here.on_first(fail)
    except UserError as error:
        heard = str(error)
    said = here.on_first(lambda: f"rank {here.rank}")
    before = [here.largest_before(number) for number in (3 * here.rank, 0, 0)]
    return here.gather(here.rank), here.largest(here.rank), before, here.means([here.rank, 4.0]), f"{said}; {heard}"


def on_each(function: Any) -> Any:
    """Return every rank's result of `function`."""
    result = function()
    return TrainerSettings(accelerator="cpu", devices=2).launch().gather(result)


def test_every_rank_hears_the_same():
    answer = ([0, 1], 1, [0, 3, 0], [0.5, 4.0], "rank 0; only rank 0 knows why")
    assert run_ranks(partial(on_each, speak), 2) == [answer, answer]


def wait_or(action: Any, rank: int) -> None:
    """One rank does something, the other waits for ever."""
    if int(os.environ["RANK"]) == rank:
        action()
    time.sleep(1000)


def refuse() -> None:
    raise UserError("this rank has another dataset")


def crash() -> None:
    raise ZeroDivisionError("a defect")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    raise Stopped("stopped by SIGTERM")


@pytest.mark.parametrize(
    ("action", "kind", "words"),
    [
        (refuse, UserError, "another dataset"),
        (crash, ZeroDivisionError, "a defect"),
        (die, UserError, "rank 1 .*signal 9"),
        (stop, Stopped, "SIGTERM"),
    ],
)
def test_when_one_fails_the_others_are_ended(monkeypatch, action, kind, words):
    monkeypatch.setattr(processes, "GRACE_S", 0.2)
    monkeypatch.setattr(processes, "END_S", 0.2)
    with pytest.raises(kind, match=words) as caught:
        run_ranks(partial(wait_or, action, 1), 2)
    if kind is ZeroDivisionError:
        assert "in crash" in caught.value.__notes__[0]  # where it happened


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    script = f"""
import os, time
from pathlib import Path
from ehr_embed.training.processes import run_ranks
def announce():
    Path({str(tmp_path)!r}, f"{{os.getpid()}}.pid").touch()
    time.sleep(1000)
if __name__ == "__main__":
    run_ranks(announce, 2)
"""
    (tmp_path / "main.py").write_text(script)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while len(pids := list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    ranks = [int(pid.stem) for pid in pids]
    assert len(ranks) == 2
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_processes_and_devices_that_do_not_fit_are_refused(monkeypatch):
    sizes = {"accelerator": "cpu", "precision": "32-true", "strategy": "auto"}
    with pytest.raises(UserError, match=r"need 4 processes.*torchrun --nnodes=2 --nproc-per-node=2"):
        launch(devices=2, nodes=2, **sizes)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert n_launched() == 8
    with refused("8 processes", "trainer.devices=1", "trainer.nodes=1"):
        launch(devices=1, nodes=1, **sizes)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(UserError, match=r"torch finds 2 here.*without --gpus-per-task"):
            launch(devices=8, nodes=1, **(sizes | {"accelerator": "cuda"}))
    with pytest.raises(UserError, match=r"Type: trainer\.precision=bf16-mixed"):
        TrainerSettings(strategy="fsdp", precision="16-mixed")
    with pytest.raises(UserError, match=r"auto, ddp, fsdp"):
        TrainerSettings(strategy="ddpp")


def test_stages_of_a_run_have_the_same_processes(dataset, tmp_path):
    settings = [o for o in overrides(dataset, tmp_path / "run") if not o.startswith(("model=", "trainer.epochs"))]
    both = [
        *settings,
        "experiment=pretrain_then_finetune",
        "trainer.epochs=1",
        "pretrain.trainer.epochs=1",
        "trainer.devices=2",
    ]
    both += [
        "pretrain.trainer.precision=32-true",
        "pretrain.trainer.accelerator=cpu",
        "pretrain.trainer.n_bootstrap=20",
        "pretrain.trainer.batch_tokens=256",  # else one batch holds all of train
    ]
    with pytest.raises(UserError, match=r"Type: pretrain\.trainer\.devices=2"):
        run(composed(*both))
    assert not (tmp_path / "run").exists()
    run(composed(*both, "pretrain.trainer.devices=2"))
    for folder in (tmp_path / "run" / "pretrain", tmp_path / "run"):
        assert len(history(folder)) == 1
        assert read_json(folder / "metrics.json")["train"]["precision"] == "32-true"


def test_masked_events_in_bfloat16(dataset, tmp_path):
    """Two ranks blank and drop other places; the run ends, and learns."""
    settings = [o for o in overrides(dataset, tmp_path / "run") if "precision" not in o and "dropout" not in o]
    run(
        composed(
            *settings, "task=masked_event", "trainer.precision=bf16-mixed", "trainer.devices=2", "model.dropout=0.1"
        )
    )
    rows = history(tmp_path / "run")
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_a_spread_model_goes_on_from_a_stop_in_evaluation(dataset, monkeypatch):
    """Its first pass is then the evaluation, and what that allocates is trained with."""
    run_dir, whole = dataset.parent / "stopped_late", dataset.parent / "not_stopped"
    together = ("trainer.devices=2", "trainer.strategy=fsdp", "trainer.epochs=2", "model.dropout=0.2")
    with pytest.raises(Stopped):
        run_ranks(partial(stop_in_evaluation, composed(*overrides(dataset, run_dir, *together))), 2)
    assert read_checkpoint(run_dir / "latest_checkpoint.pt")[1]["progress"]["batch"] == 4
    for folder in (run_dir, whole):
        run(composed(*overrides(dataset, folder, *together)))
    np.testing.assert_array_equal(predictions(run_dir), predictions(whole))


def stop_in_evaluation(cfg: Any) -> None:
    """A run in whose first evaluation rank 1 gets a signal."""
    predict = Trainer.evaluate

    def after_signal(self: Trainer, *arguments: Any) -> Any:
        if self.processes.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return predict(self, *arguments)

    Trainer.evaluate = after_signal  # type: ignore[method-assign]
    run(cfg)


def draw() -> list[float]:
    """The first random number of each rank once it trains."""
    here = TrainerSettings(accelerator="cpu", devices=2).launch()
    torch.manual_seed(seed_of_rank(0, here.rank))
    return here.gather(float(torch.rand(())))


def test_each_rank_draws_for_itself():
    first, second = run_ranks(draw, 2)
    assert first != second
    seeds = [seed_of_rank(seed, rank) for seed in range(3) for rank in range(1, 5)]
    drawn = []
    for seed in seeds:
        torch.manual_seed(seed)
        drawn.append(float(torch.rand(())))
    assert len(set(drawn)) == len(seeds), "torch's generator for CPUs reads 32 bits of a seed"


def share_and_first() -> list[Any]:
    """A model's weights and buffers after sharing, and the order in which ranks did something."""
    here = TrainerSettings(accelerator="cpu", devices=2).launch()
    model = torch.nn.BatchNorm1d(3)
    torch.nn.init.constant_(model.weight, here.rank + 5)
    model.running_mean.fill_(here.rank + 7)  # type: ignore[union-attr]
    here.share(model)
    began = here.first(time.monotonic)
    return here.gather((model.weight.tolist(), model.running_mean.tolist(), began))  # type: ignore[union-attr]


def test_all_start_from_what_rank_0_has():
    (weights, means, first), (others, other_means, later) = run_ranks(share_and_first, 2)
    assert weights == others == [5.0] * 3
    assert means == other_means == [7.0] * 3
    assert first < later


@pytest.mark.slow
def test_a_trial_is_alone_however_its_search_was_started(dataset, tmp_path):
    """Two searches of one step of Slurm's, as `srun -n 2` has them, are two processes on one study and not one run."""
    more = [o for o in overrides(dataset, tmp_path / "unused") if not o.startswith("run_dir")]
    command = [sys.executable, "train.py", "-m", "hydra/sweeper=study", f"hydra.sweep.dir={tmp_path / 'search'}"]
    command += ["hydra.sweeper.n_trials=1", "trainer.weight_decay=interval(0.0,0.1)", *more]
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"}
    done = subprocess.run(command, env=os.environ | step, **PIPED, check=False)
    assert done.returncode == 0, done.stdout
    assert read_json(tmp_path / "search" / "0" / "outcome.json")["state"] == "finished", done.stdout


def test_fewer_batches_than_processes_are_refused(dataset, tmp_path):
    with refused("(2)", "fewer batches"):
        run(composed(*overrides(dataset, tmp_path / "run", "trainer.batch_size=64", "trainer.devices=2")))


def test_a_model_fitted_at_once_takes_one_process(dataset, tmp_path):
    more = ("model=logistic", "embedder.trainable=frozen", "trainer.devices=2")
    settings = [o for o in overrides(dataset, tmp_path / "run") if not o.startswith("model") and "trainable" not in o]
    with pytest.raises(UserError, match=r"Type: trainer\.devices=1"):
        run(composed(*settings, *more))
