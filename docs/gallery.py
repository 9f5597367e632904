"""Make the pictures of docs/gallery.md from the demo: `make gallery`, or `python docs/gallery.py [FOLDER]`, in some minutes.

Each picture is what a command of the package leaves, in fewer colours so that it is small, and is named after that command's step
in `STEPS`. FOLDER keeps the runs; a step that is finished there is not run again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
GALLERY = ROOT / "docs" / "gallery"
N_COLOURS, WIDEST, MOST_BYTES = 48, 1000, 600_000
SMALL = ("data.n_subjects=3000", "trainer.threads=1")
TINY = ("data.n_subjects=800", "trainer.threads=1", "trainer.n_bootstrap=0")
STEPS: dict[str, tuple[str, ...]] = {
    "run": ("train", *SMALL, "trainer.epochs=8", "run_dir=run"),
    "boosting": ("train", *SMALL, "model=gbm", "run_dir=boosting"),
    "compared": ("compare", "run", "boosting", "--output", "compared"),
    "explained": ("explain", "run=run", "max_samples=150", "threads=1"),
    "subject": ("explain", "run=run", "subject={subject}", "threads=1", "output=subject"),
    "search": (
        "train",
        "-m",
        "hydra/sweeper=study",
        "hydra.sweeper.study_name=search",
        "hydra.sweeper.n_trials=12",
        *TINY,
        "trainer.learning_rate=tag(log,interval(1e-4,1e-2))",
        "model.pooling=mean,attention,cls",
        "model.dropout=interval(0,0.4)",
        "trainer.epochs=5",
        "hydra.sweep.dir=search",
    ),
    "hazards": (
        "train",
        *SMALL,
        "task=time_to_event",
        "task.outcomes=auto",
        "model=decoder_small",
        "trainer=pretrain_short",
        "trainer.epochs=4",
        "trainer.n_bootstrap=0",
        "run_dir=hazards",
    ),
    "answers": (
        "ask",
        "run=hazards",
        "data.root={data}",
        "questions=[heart failure]",
        "horizon_days=365",
        "output=answers",
        "threads=1",
    ),
    "times": (
        "train",
        *SMALL,
        "task=time_to_event",
        "task.outcomes={heart_failure: {text_pattern: heart failure}}",
        "model=cox",
        "trainer.n_bootstrap=0",
        "run_dir=times",
    ),
}
"""Step -> the words after `ehr-embed`."""
PICTURES = {
    "run-loss": "run/plots/loss.png",
    "run-roc": "run/plots/roc.png",
    "run-precision_recall": "run/plots/precision_recall.png",
    "run-calibration": "run/plots/calibration.png",
    "run-decision_curve": "run/plots/decision_curve.png",
    "explain-texts": "run/explained/texts.png",
    "explain-subject": "subject/subject_{subject}.png",
    "search-learning_curves": "search/plots/learning_curves.png",
    "search-optimization_history": "search/plots/optimization_history.png",
    "search-param_importances": "search/plots/param_importances.png",
    "search-slice": "search/plots/slice.png",
    "search-parallel_coordinate": "search/plots/parallel_coordinate.png",
    "ask-curves": "answers/plots/1_heart_failure.png",
    "times-risk_groups": "times/plots/risk_groups_heart_failure.png",
}
"""Picture of the page -> the file that a step left. A file that this version does not write is passed over."""
PAGES = {"report-run": "run/report.html", "report-search": "search/report.html"}
"""Picture -> a page that is photographed where a browser is at hand."""


def main(folder: Path) -> None:
    """Run the steps in `folder`, and write their pictures into docs/gallery/."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {"data": str(folder / "cache" / "demo-3000-0"), "subject": ""}
    for name, step in STEPS.items():
        if "subject={subject}" in step:
            words["subject"] = _riskiest(folder)
        if (folder / f"{name}.done").exists():
            continue
        command = [
            sys.executable,
            "-m",
            "ehr_embed",
            *(word.replace("{data}", words["data"]).replace("{subject}", words["subject"]) for word in step),
        ]
        print("ehr-embed", *command[3:], flush=True)
        environment = os.environ | {"EHR_EMBED_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=environment, check=False)
        if done.returncode == 0:
            (folder / f"{name}.done").touch()
        else:
            print(f"left out: {name} ended with code {done.returncode}", file=sys.stderr)
    GALLERY.mkdir(exist_ok=True)
    for name, path in PICTURES.items():
        source = folder / path.format(**words)
        if source.is_file():
            shrink(source, GALLERY / f"{name}.png")
    for name, path in PAGES.items():
        if (folder / path).is_file() and (shot := _photograph(folder / path, folder / f"{name}.png")):
            shrink(shot, GALLERY / f"{name}.png")
    size = sum(path.stat().st_size for path in GALLERY.glob("*.png"))
    print(f"{len(list(GALLERY.glob('*.png')))} pictures, {size / 1024:.0f} KiB")
    if size > MOST_BYTES:
        sys.exit(f"the gallery has {size} bytes, more than {MOST_BYTES}: use fewer colours or smaller pictures")


def shrink(source: Path, target: Path) -> None:
    """Write a picture with few colours and at most `WIDEST` pixels wide."""
    with Image.open(source) as image:
        picture = image.convert("RGB")
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    picture.quantize(N_COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


def _riskiest(folder: Path) -> str:
    """Return the held-out subject of the synthetic cohort whose predicted risk is highest."""
    import polars as pl

    rows = pl.read_parquet(folder / "run" / "predictions" / "held_out.parquet")
    return str(rows.sort("predicted_boolean_probability", descending=True)["subject_id"][0])


def _photograph(page: Path, picture: Path) -> Path | None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("no chromium: the pictures of report.html stay as they are", file=sys.stderr)
        return None
    flags = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=1100,1000"]
    subprocess.run([browser, *flags, f"--screenshot={picture}", page.as_uri()], capture_output=True, check=False)
    return picture if picture.is_file() else None


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
