"""Run an entry point in this process, and a dataset whose outcome is told by synonyms."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from tests.helpers.small_meds import ROOT, write_meds


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]


@pytest.fixture
def inside(monkeypatch, capfd):
    """`call` in this process, which has torch loaded already."""

    def run(*arguments: str, cwd: Path, code: int = 0) -> str:
        monkeypatch.chdir(cwd)
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        is_module = arguments[0] == "-m"
        monkeypatch.setattr(sys, "argv", list(arguments[1:]) if is_module else command(*arguments)[1:])
        returned = 0
        if is_module:  # as in a new process, where nothing has imported it yet
            monkeypatch.delitem(sys.modules, sys.argv[0], raising=False)
        try:
            (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            returned = int(stop.code or 0)
        finally:
            logging.getLogger().handlers.clear()
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None  # type: ignore[assignment]  # else a multirun's would be that of later runs
        return checked(returned, "".join(capfd.readouterr()), code)

    return run


def checked(returned: int, output: str, code: int) -> str:
    assert returned == code, output
    assert code == 0 or "Traceback" not in output, output
    return output


def metrics_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


CARDIAC = (
    ("Heart failure", "Left ventricular dysfunction", "Congestive cardiomyopathy", "Myocardial infarction"),
    ("Coronary artery disease", "Cardiac insufficiency", "Enlarged heart", "Angina pectoris"),
)


INJURY = (
    ("Fracture of the ankle", "Broken wrist bone", "Sprained knee ligament", "Torn shoulder tendon"),
    ("Dislocated elbow", "Bruised rib", "Fractured collarbone", "Strain of the neck muscles"),
)


QUALIFIERS = ("", "Acute: ", "Known: ", "History of: ", "Suspected: ", "Follow-up of: ")


def write_synonyms(root: Path) -> Path:
    """Labelled train subjects have one half of the names of two kinds of disease, held-out ones the other half, which
    unlabelled train subjects bring into the vocabulary: only a text tells which kind an unlabelled name is."""
    halves = [[[q + name for name in kind[half] for q in QUALIFIERS] for kind in (INJURY, CARDIAC)] for half in (0, 1)]
    texts = [text for half in halves for kind in half for text in kind]
    code = {text: f"C//{i}" for i, text in enumerate(texts)}
    splits: dict[str, list] = {"train": [], "tuning": [], "held_out": []}
    labels = []
    for split, half, count in (("train", 0, 240), ("tuning", 1, 96), ("held_out", 1, 96)):
        for i in range(count):
            subject, is_cardiac = len(labels), i % 2 == 1
            names = halves[half][is_cardiac]
            splits[split] += [(subject, float(k), code[names[(i // 2 + 5 * k) % len(names)]], None) for k in range(3)]
            labels.append((subject, 5.0, is_cardiac))
    splits["train"] += [(10_000 + i, 0.0, code[text], None) for i, text in enumerate(texts)]
    return write_meds(root, splits, codes=[(code[text], text, None) for text in texts], labels={"cardiac": labels})
