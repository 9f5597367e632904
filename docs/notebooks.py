"""Execute the notebooks of the documentation and keep their outputs in them: `python docs/notebooks.py [NAME ...]`.

Each runs from its first cell in a fresh kernel and an empty folder. The site shows the outputs that lie in the files, so that
building it takes seconds; a test says when a cell was changed after it was executed, and executes the cells. The command needs
the extra `notebooks`.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
EXECUTED = "executed"
"""Key of a notebook's metadata that says of which cells its outputs are, and where and when they were made."""
TIMEOUT = 900
NO_WIDGETS = "ignore:IProgress not found"
"""tqdm says it where Jupyter's widgets are not installed; nothing here draws one."""


def digest(notebook: dict[str, Any]) -> str:
    """Return a digest of the code of a notebook.

    >>> a, b = ({"cells": [{"cell_type": "code", "source": [line]}]} for line in ("1 + 1", "1 + 2"))
    >>> digest(a) == digest(b), len(digest(a))
    (False, 16)
    """
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


def joined(outputs: list[Any]) -> list[Any]:
    """Return the outputs of a cell with the pieces of a stream as one."""
    found: list[Any] = []
    for output in outputs:
        if found and output.output_type == "stream" == found[-1].output_type and output.name == found[-1].name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def smaller(png: str) -> str:
    """Return a PNG picture, in base64, with 64 colours, as many as a plot has."""
    from PIL import Image

    held = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(64).save(held, "PNG", optimize=True)
    return base64.b64encode(held.getvalue()).decode()


def execute(path: Path) -> None:
    """Execute a notebook and write it with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    sys.path.insert(0, str(DOCS.parent))
    from ehr_embed.experiment.provenance import processor

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        hidden = ("EHR_EMBED_CACHE", "PYTHONPATH")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        client = NotebookClient(
            notebook, timeout=TIMEOUT, resources={"metadata": {"path": folder}}, record_timing=False
        )
        client.execute(env=environment | {"PYTHONPATH": str(DOCS.parent), "PYTHONWARNINGS": NO_WIDGETS})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell["execution_count"] = None
            cell.outputs = joined(cell.outputs)
            for output in cell.outputs:
                if output.get("name") == "stderr":
                    sys.exit(f"{path.name}: a cell wrote to stderr: {output.text}")
                if "execution_count" in output:
                    output["execution_count"] = None
                if "image/png" in output.get("data", {}):
                    output["data"]["image/png"] = smaller(output["data"]["image/png"])
    text = nbformat.writes(notebook)
    if folder in text:
        sys.exit(f"{path.name}: an output names a folder of this machine")
    kept = json.loads(text)
    kept["metadata"] = {
        **{key: value for key, value in kept["metadata"].items() if key == "kernelspec"},
        EXECUTED: {
            "code": digest(kept),
            "hardware": f"{os.cpu_count()} CPU cores, {processor()}",
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        },
    }
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for path in [DOCS / name for name in sys.argv[1:]] or sorted(DOCS.glob("*.ipynb")):
        execute(path)
        print(f"executed {path.relative_to(DOCS.parent)}")
