"""The comparison with other packages, with peers that need no installation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import batches, peers
from benchmarks.peers import __main__ as comparison
from benchmarks.peers import environments
from benchmarks.peers.environments import CannotInstallError, Peer, python_of, run
from benchmarks.training import Sides
from ehr_embed.exports.patient_files import sample_record

TINY = ("--subjects", "40", "--model-dim", "16", "--layers", "1", "--device", "cpu", "--repeats", "1")
COUNTS = """
import json, sys
sys.path.insert(0, {folder!r})
from records import Records, pad, say, seconds
records = Records(sys.argv[1])
padded = [pad([records[int(i)] for i in batch]) for batch in records.batches]
n_events = sum(int(batch["mask"].sum()) for batch in padded)
n_labels = sum(len(batch["labels"]) for batch in padded)
print("noise before the line")
say((2.0, 1.0), n_events, peer="counts 1.0", n_records=len(records), n_labels=n_labels, way=sys.argv[2])
"""


def test_both_sides_of_a_pair_get_the_same_events_and_their_ratio_is_told(tmp_path, monkeypatch, capsys):
    script = tmp_path / "run_counts.py"
    script.write_text(COUNTS.format(folder=str(Path(peers.__file__).parent)))
    monkeypatch.setattr(comparison, "HUGGING_FACE", Peer("counts", str(script), ()))
    monkeypatch.setattr(comparison, "python_of", lambda peer, folder: Path(sys.executable))
    comparison.main(["--peers", "hugging_face", "--environments", str(tmp_path / "cache"), *TINY])
    (found,) = (json.loads(text) for text in capsys.readouterr().out.splitlines() if text.startswith("{"))
    assert found["n_events_ours"] == found["n_events_theirs"] > 32
    assert found["n_labels_theirs"] == found["n_records_theirs"] == 32
    assert (found["peer"], found["way_theirs"]) == ("counts 1.0", "same")
    assert found["events_per_s_theirs"] == pytest.approx(found["n_events_theirs"] / 2, rel=1e-3)
    assert 0 < found["ratio"] == pytest.approx(found["events_per_s_ours"] / found["events_per_s_theirs"], rel=1e-2)
    assert {"ratio_cpu_time", "events_per_cpu_s_ours", "versions", "threads"} <= set(found)


def test_a_peer_gets_our_records_labels_and_batches(tmp_path):
    options = comparison.options_of(["--peers", "hugging_face", *TINY])
    sides = Sides(comparison.make(tmp_path / "ours"), options, with_files=False)
    comparison.write_records(sides, tmp_path / "records")
    held = np.load(tmp_path / "records" / "records.npz")
    samples, events = sides.task.samples["train"], sides.store.split("train")
    assert sorted(held["order"].tolist()) == list(range(len(samples))), "each record once"
    for number in range(len(samples)):
        expected = sample_record(events, samples, number, sides.table)
        tokens = held["token_ids"][held["offsets"][number] : held["offsets"][number + 1]]
        assert tokens.tolist() == expected["token_ids"].tolist()
        assert held["labels"][number] == expected["label"]
    sizes = json.loads((tmp_path / "records" / "sizes.json").read_text())
    assert (sizes["model_dim"], sizes["layers"], sizes["vocab_size"]) == (16, 1, len(sides.table))


def test_a_peer_that_pip_cannot_install_is_left_out_with_what_pip_said(tmp_path, monkeypatch, capsys):
    def refuses(peer, folder):
        raise CannotInstallError("ERROR: No matching distribution found for it")

    monkeypatch.setattr(comparison, "python_of", refuses)
    comparison.main(["--peers", "pyhealth", "--environments", str(tmp_path / "cache"), *TINY])
    (found,) = (json.loads(text) for text in capsys.readouterr().out.splitlines() if text.startswith("{"))
    assert (found["side"], found["refused"]) == ("pyhealth", "ERROR: No matching distribution found for it")
    assert "ratio" not in found


def test_a_peers_script_that_fails_says_why(tmp_path):
    script = tmp_path / "run_it.py"
    for text in ("raise SystemExit('its own reason')", "import sys; sys.stderr.write('its own reason')"):
        script.write_text(text)
        with pytest.raises(RuntimeError, match="its own reason"):
            run(Peer("it", str(script), ()), Path(sys.executable))


def test_a_peer_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    measured = {"seconds": 1.0, "cpu_seconds": 1.0, "n_events": 10, "peer": "name 1.0"}

    def fails(python):
        raise RuntimeError("it failed: its own reason")

    pairs = {
        "hugging_face": comparison.Pair(comparison.HUGGING_FACE, lambda: measured, fails),
        "pyhealth": comparison.Pair(comparison.PYHEALTH, lambda: measured, lambda python: measured),
    }
    monkeypatch.setattr(comparison, "pairs_of", lambda options, folder: pairs)
    monkeypatch.setattr(comparison, "python_of", lambda peer, folder: Path(sys.executable))
    assert comparison.main(["--peers", *pairs, "--environments", str(tmp_path), *TINY]) == 1
    failed, told = (json.loads(text) for text in capsys.readouterr().out.splitlines() if text.startswith("{"))
    assert (failed["side"], failed["failed"]) == ("hugging_face", "it failed: its own reason")
    assert (told["side"], told["ratio"]) == ("pyhealth", 1.0)


@pytest.mark.parametrize("given", [("--epochs", "2"), ("--batch-size", "8"), ("--batch-tokens", "0")])
def test_what_would_hold_for_one_side_alone_is_no_option(given, capsys):
    with pytest.raises(SystemExit):
        comparison.options_of(list(given))
    assert given[0] in capsys.readouterr().err


def test_an_environment_is_made_again_unless_it_was_finished_with_the_same_packages(tmp_path, monkeypatch):
    made = []

    def pretends(command, **options):
        made.append(command)
        (tmp_path / "it").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environments.subprocess, "run", pretends)
    monkeypatch.setattr(environments, "share_torch", lambda home: None)
    python_of(Peer("it", "run_it.py", ("one",)), tmp_path)
    assert [command[-1] for command in made] == [str(tmp_path / "it"), "one"]
    python_of(Peer("it", "run_it.py", ("one",)), tmp_path)
    assert len(made) == 2, "it is kept"
    python_of(Peer("it", "run_it.py", ("one", "two")), tmp_path)
    assert len(made) == 4, "other packages"
    monkeypatch.setattr(sys, "version", "another Python")
    python_of(Peer("it", "run_it.py", ("one", "two")), tmp_path)
    assert len(made) == 6, "the environment's Python is gone"


@pytest.mark.slow
def test_an_environment_has_our_torch_and_not_our_other_packages(tmp_path):
    python = python_of(Peer("pip", "run_none.py", ("pip",)), tmp_path)
    asked = "import importlib.metadata as m, importlib.util as u; print(m.version('torch'), u.find_spec('polars'))"
    found = subprocess.run(
        [python, "-c", asked], capture_output=True, text=True, env=environments.environment(), check=True
    )
    assert found.stdout.split() == [torch.__version__, "None"]


def test_the_batches_of_the_other_benchmark_find_their_script():
    assert batches.PEER.exists()
