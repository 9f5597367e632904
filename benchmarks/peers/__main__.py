"""Training, generation and batches beside other packages, in one run by turns.

    python -m benchmarks.peers
    python -m benchmarks.peers --peers hugging_face meds_eic_ar --subjects 400 --repeats 3

Each peer has an environment of its own, which pip fills once (`--environments`; with the torch of this one), and each measurement
is a process of its own there, whose start, loading and first steps are not counted. Rates are events/s without padding. `ratio` is
the median of ours over the peer's, of measurements that follow each other; `ratio_cpu_time` is the same of CPU seconds, which other
programs change less; ours include an evaluation and a checkpoint. A peer that pip cannot install is left out, and the line says
what pip said; of one whose measurement fails the line says why, and at the end the exit code is 1.

What does the same as what:

- hugging_face: the encoder in mixed precision against BERT of the same sizes above the same frozen vectors, with the same batches
  and the same precision; hugging_face_defaults: against the Trainer's own batches and float32
- pyhealth: the encoder against its Transformer and Trainer, whose batches are random, whose precision is float32, and whose vectors
  are learned
- meds_eic_ar: the decoder, which predicts events and gaps, against its Llama of the same sizes in batches of similar length in the
  same precision; meds_eic_ar_futures: futures with times against its futures, which have none
- meds_torch_data: batches with times against its batches, see benchmarks/batches.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import batches
from benchmarks.common import parser, ratio, report
from benchmarks.generation_cache import random_prompts
from benchmarks.peers.environments import CannotInstallError, Peer, python_of, run
from benchmarks.training import BATCH_SIZE, LEARNING_RATE, SIZES, Sides, dataset_of
from ehr_embed.data.bucket_sampler import BucketSampler
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.exports.patient_files import sample_record
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.sampling import Sampling, generate
from ehr_embed.training.precision import choose_precision

HUGGING_FACE = Peer("hugging_face", "run_hugging_face.py", ("transformers[torch]",))
MEDS_EIC_AR = Peer("meds_eic_ar", "run_meds_eic_ar.py", ("meds-eic-ar",))
MEDS_TORCH_DATA = Peer("meds_torch_data", "run_meds_torch_data.py", ("meds-torch-data==0.9.*",))
PYHEALTH = Peer("pyhealth", "run_pyhealth.py", ("pyhealth", "numpy<2", "setuptools<80"))
"""Its last version for Python 3.11 needs, unsaid, a numpy that its pandas knows and the `pkg_resources` of setuptools."""
FUTURES = {"prompts": 2, "futures": 20, "prompt": 192, "new": 64}
N_HEADS = 8
OURS_ALONE = {"batch_size": BATCH_SIZE, "compile": 0, "epochs": 1, "pretrain": 0}
"""Sizes that the peers' scripts fix, or that no peer has; they are no options."""

Measured = dict[str, Any]
"""`seconds`, `cpu_seconds`, `n_events`, and what else a side says of itself."""


@dataclass(frozen=True)
class Pair:
    """A peer with what of this project does the same.

    Attributes:
        peer: the package.
        ours: measures this project.
        theirs: measures the peer with the Python of its environment.
    """

    peer: Peer
    ours: Callable[[], Measured]
    theirs: Callable[[Path], Measured]


def write_records(sides: Sides, folder: Path) -> None:
    """Write train's samples for the peers, in the batches of the first epoch of our trainer, see records.py."""
    folder.mkdir()
    options, task = sides.options, sides.task
    samples, events = task.samples["train"], sides.store.split("train")
    records = [sample_record(events, samples, number, sides.table) for number in range(len(samples))]
    tokens = [record["token_ids"].numpy() for record in records]
    lengths = np.array([len(x) for x in tokens])
    sampler = BucketSampler(lengths, batch_size=BATCH_SIZE, batch_tokens=options.batch_tokens, shuffle=True)
    sampler.set_epoch(1)
    order = list(sampler)
    np.savez(
        folder / "records.npz",
        token_ids=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=samples.labels,
        order=np.concatenate(order),
        batch_offsets=np.concatenate([[0], np.cumsum([len(batch) for batch in order])]),
        table=sides.table.numpy(),
    )
    sizes = {name: getattr(options, name) for name in ("model_dim", "layers", "context", "device", "prompt", "new")}
    sizes |= {"n_prompts": options.prompts, "n_futures": options.futures, "vocab_size": len(sides.table)}
    sizes |= {"n_heads": N_HEADS, "dropout": options.dropout_percent / 100, "batch_size": BATCH_SIZE}
    sizes |= {"learning_rate": LEARNING_RATE, "precision": precision_of(options)}
    (folder / "sizes.json").write_text(json.dumps(sizes))


def precision_of(options: argparse.Namespace) -> str:
    """Return the precision of both sides."""
    return "32-true" if options.float32 else choose_precision("auto", options.device)


def timed(work: Callable[[], int]) -> Measured:
    """Return the seconds of `work`, which returns a number of events."""
    began, cpu_began = time.perf_counter(), time.process_time()
    n_events = work()
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "n_events": n_events,
    }


def our_training(sides: Sides) -> Measured:
    """Return what an epoch of our trainer took, its evaluation on tuning left out of the wall time alone."""

    def work() -> int:
        sides.ours()
        return sides.n_events["ours"]

    took, facts = timed(work), sides.facts
    return took | {
        "seconds": facts["seconds"],
        **{name: facts[name] for name in ("precision", "n_trained")},
    }


def our_futures(options: argparse.Namespace, vocab_size: int) -> Measured:
    """Return what futures of random prompts took."""
    torch.manual_seed(0)
    model = Decoder(
        embedding_dim=384,
        vocab_size=vocab_size,
        model_dim=options.model_dim,
        n_layers=options.layers,
        n_heads=N_HEADS,
        max_length=options.prompt + options.new,
    )
    model = model.eval().to(options.device)
    embedding = EventEmbedding(torch.randn(vocab_size, 384)).to(options.device)
    prompts = random_prompts(options.prompts, options.prompt, vocab_size).to(torch.device(options.device))
    sampling = Sampling(max_new_events=options.new, horizon_days=1e9, n_samples=options.futures)
    is_bf16 = precision_of(options).startswith("bf16")

    def work() -> int:
        generator = torch.Generator(options.device).manual_seed(0)
        with torch.autocast(options.device, torch.bfloat16, enabled=is_bf16):
            return len(generate(model, embedding, prompts, sampling, generator).token_ids)

    return timed(work)


def pairs_of(options: argparse.Namespace, folder: Path) -> dict[str, Pair]:
    """Return the pairs that `--peers` names, with the data of both sides under `folder`."""
    encoder = Sides(make(folder / "encoder"), options, with_files=False)
    records = folder / "records"
    write_records(encoder, records)
    found = {
        "hugging_face": Pair(
            HUGGING_FACE, partial(our_training, encoder), lambda python: run(HUGGING_FACE, python, records, "same")
        ),
        "hugging_face_defaults": Pair(
            HUGGING_FACE, partial(our_training, encoder), lambda python: run(HUGGING_FACE, python, records, "defaults")
        ),
        "pyhealth": Pair(PYHEALTH, partial(our_training, encoder), lambda python: run(PYHEALTH, python, records)),
    }
    if any(name.startswith("meds_eic_ar") for name in options.peers):
        own = argparse.Namespace(**{**vars(options), "pretrain": 1})
        decoder = Sides(make(folder / "decoder"), own, with_files=False)
        found["meds_eic_ar"] = Pair(
            MEDS_EIC_AR, partial(our_training, decoder), lambda python: run(MEDS_EIC_AR, python, records, "train")
        )
        found["meds_eic_ar_futures"] = Pair(
            MEDS_EIC_AR,
            partial(our_futures, options, len(encoder.table)),
            lambda python: run(MEDS_EIC_AR, python, records, "generate"),
        )
    if "meds_torch_data" in options.peers:
        found["meds_torch_data"] = batch_pair(options, folder)
    return {name: found[name] for name in options.peers}


def batch_pair(options: argparse.Namespace, folder: Path) -> Pair:
    """Return the pair of benchmarks/batches.py."""
    root = batches.cohort(folder / "batches", options.subjects)
    device = torch.device(options.device)
    loader = batches.our_loaders(root, folder / "batches_store", device)["ours"]
    tensors = folder / "tensors"

    def theirs(python: Path) -> Measured:
        if not tensors.exists():
            batches.preprocess(python.parent, root, tensors)
        return batches.peer_epoch(str(python.parent), tensors)

    return Pair(MEDS_TORCH_DATA, lambda: batches.epoch(loader, batches.HOST), theirs)


def make(folder: Path) -> Path:
    """Return a new folder."""
    folder.mkdir()
    return folder


def installed(names: list[str], pairs: dict[str, Pair], folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the Python of each peer, and what pip said of those that it cannot install."""
    pythons: dict[str, Path] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            pythons[name] = python_of(pairs[name].peer, folder)
        except CannotInstallError as error:
            refused[name] = str(error)
    return pythons, refused


def compare(pair: Pair, python: Path, repeats: int) -> dict[str, Any]:
    """Return rates, CPU times and ratios of a pair, measured by turns after a warm-up of our side.

    >>> measured = {"seconds": 1.0, "cpu_seconds": 1.0, "n_events": 600}
    >>> pair = Pair(HUGGING_FACE, lambda: measured | {"n_events": 6000}, lambda python: measured | {"peer": "name 1.0"})
    >>> found = compare(pair, Path(), 2)
    >>> found["ratio"], found["events_per_s_ours"], found["events_per_s_theirs"], found["peer"]
    (10.0, 6000.0, 600.0, 'name 1.0')
    """
    pair.ours()
    turns = [(pair.ours(), pair.theirs(python)) for _ in range(repeats)]
    sides = {"ours": [ours for ours, _ in turns], "theirs": [theirs for _, theirs in turns]}
    result: dict[str, Any] = {}
    for clock, key in (("seconds", "ratio"), ("cpu_seconds", "ratio_cpu_time")):
        if any(clock not in one for many in sides.values() for one in many):
            continue
        rates = {side: [one["n_events"] / one[clock] for one in many] for side, many in sides.items()}
        result[key] = ratio(rates["ours"], rates["theirs"])
        of = "s" if clock == "seconds" else "cpu_s"
        result |= {f"events_per_{of}_{side}": statistics.median(values) for side, values in rates.items()}
    known = ("seconds", "cpu_seconds", "peer")
    for side, many in sides.items():
        result |= {f"{name}_{side}": value for name, value in many[-1].items() if name not in known}
    return result | {"peer": sides["theirs"][-1]["peer"]}


NAMES = ("hugging_face", "hugging_face_defaults", "pyhealth", "meds_eic_ar", "meds_eic_ar_futures", "meds_torch_data")


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line: those that hold for both sides."""
    sizes = {name: size for name, size in SIZES.items() if name not in OURS_ALONE}
    found = parser(__doc__, repeats=3, **{"subjects": 240, **sizes, **FUTURES})
    found.set_defaults(**OURS_ALONE)
    cache = Path(os.environ.get("EHR_EMBED_CACHE", "~/.cache/ehr_embed")).expanduser()
    found.add_argument("--environments", type=Path, default=cache / "peers", help="where the environments are kept")
    found.add_argument("--peers", nargs="+", choices=NAMES, default=list(NAMES), metavar="PEER", help=", ".join(NAMES))
    options = found.parse_args(arguments)
    if options.batch_tokens < 1:
        found.error("--batch-tokens: both sides get the same batches, so it is a number of events, such as 16384")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure each pair, print a JSON line per pair as soon as it is known, and return the exit code: 1 if a pair failed."""
    options = options_of(arguments)
    options.environments.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        pairs = pairs_of(options, Path(name))
        pythons, refused = installed(options.peers, pairs, options.environments.resolve())
        n_failed = 0
        for peer in options.peers:
            if peer in refused:
                result: dict[str, Any] = {"refused": refused[peer]}
            else:
                try:
                    result = compare(pairs[peer], pythons[peer], options.repeats)
                except (RuntimeError, subprocess.CalledProcessError) as error:
                    result, n_failed = {"failed": told(error)}, n_failed + 1
            report(
                "peers",
                {"side": peer}
                | result
                | {key: getattr(options, key) for key in ("repeats", "model_dim", "layers", *FUTURES)},
                dataset=dataset_of(options),
                device=options.device,
            )
    return int(n_failed > 0)


def told(error: Exception) -> str:
    """Return an error in words, with the end of what a program that failed wrote to its standard error.

    >>> told(subprocess.CalledProcessError(1, ["program"], stderr=b"its own reason"))
    "Command '['program']' returned non-zero exit status 1.: its own reason"
    """
    written = getattr(error, "stderr", None) or ""
    text = written.decode(errors="replace") if isinstance(written, bytes) else written
    return f"{error}: {text.strip()[-2000:]}" if text else str(error)


if __name__ == "__main__":
    sys.exit(main())
