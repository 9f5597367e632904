"""Make a run's folder of a checkpoint of the original pipeline: its weights in `Original`, with the vocabulary of its data."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor

from ehr_embed.config.check import checks_config
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.experiment.inputs import prepare_from
from ehr_embed.experiment.provenance import resolved, write_inputs
from ehr_embed.models.original import Original
from ehr_embed.run_folder.layout import BEST

TARGET = f"{Original.__module__}.{Original.__name__}"
RENAMED = {
    "input_projection": "body.input_projection",
    "transformer_encoder": "body.transformer",
    "transformer_decoder": "body.transformer",
    "classifier": "head",
}
LEFT_OUT = ("pos_encoding", "lm_head")
"""Positions, which are computed, and the head over tokens, which no classifier has."""
REMEDY = "Type: python -m ehr_embed.convert checkpoint=OLD.pt output=RUN data=patient_files data.data_dir=DIR"


@checks_config("RunKeys")
def convert_checkpoint(cfg: DictConfig) -> Path:
    """Write the run of `cfg.checkpoint` to `cfg.output`, and return its folder.

    Raises:
        UserError: the file is no checkpoint of the original, its sizes are not known, or the data's vectors have another width.
    """
    weights, settings = read_original(Path(cfg.checkpoint).expanduser())
    options, sizes = options_of(weights, settings, n_heads=cfg.n_heads)
    output = Path(cfg.output).expanduser()
    if output.exists() and any(output.iterdir()):
        raise UserError(f"output={output} is not empty, and nothing was written. Type: output=ANOTHER")
    _, prepared = prepare_from(cfg)
    if (width := prepared.table.shape[1]) != sizes["embedding_dim"]:
        raise UserError(
            f"{cfg.checkpoint} reads vectors of width {sizes['embedding_dim']}, and those of the data have {width}: another "
            f"embedder made them. {REMEDY}"
        )
    model = Original(**options, **sizes)
    model.load_state_dict(renamed_weights(weights))
    run_cfg = cfg.copy()
    with open_dict(run_cfg):
        for key in ("checkpoint", "output", "n_heads", "export", "overwrite"):
            run_cfg.pop(key, None)
        run_cfg.model = {"_target_": TARGET, **options}
        run_cfg.trainer.precision = "32-true"  # in which the original computed
    config = resolved(run_cfg, output)
    n_classes = sizes["num_classes"]
    output.mkdir(parents=True, exist_ok=True)
    write_inputs(output, config, prepared)
    about = {
        "config": config,
        "identity": prepared.identity,
        "sizes": sizes | {"has_values": False},
        "class_names": ["false", "true"] if n_classes == 2 else [str(number) for number in range(n_classes)],
        "precision": "32-true",
        "epoch": 0,
        "model_state_dict": model.state_dict(),
    }
    with atomic_path(output / BEST) as path:
        torch.save(about, path)
    return output


def read_original(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of a checkpoint of the original, and the section `model` of its configuration (empty if there is none).

    Nothing in the file is run: it may hold tensors, plain values, and numpy's numbers, which the original's metrics are.

    Raises:
        UserError: it is no such checkpoint.
    """
    if not path.is_file():
        raise UserError(f"checkpoint={path}: no such file. {REMEDY}")
    numbers: list[Any] = [
        np.dtype,
        np.float64(0).__reduce__()[0],
        *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
    ]
    try:
        with torch.serialization.safe_globals(numbers):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]}). {REMEDY}") from error
    weights = found.get("model_state_dict", found) if isinstance(found, dict) else {}
    weights = {str(name).removeprefix("module."): x for name, x in weights.items() if isinstance(x, Tensor)}
    if not any(re.match(r"transformer_(en|de)coder\.layers\.0\.", name) for name in weights):
        raise UserError(
            f"{path}: expected weights named transformer_encoder.layers.0... or transformer_decoder.layers.0..., as the "
            f"embedded-based pipeline saved them; found {', '.join(sorted(weights)[:3]) or 'none'}. {REMEDY}"
        )
    if "classifier.1.weight" not in weights:
        raise UserError(
            f"{path} has no classifier: it was only pretrained, and a run predicts classes. Convert the "
            "checkpoint of its fine-tuning."
        )
    config = found.get("config") or {}
    return weights, dict(config.get("model", config))


def options_of(
    weights: dict[str, Tensor], settings: dict[str, Any], *, n_heads: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of `Original`, and the sizes that data dictate, from the shapes of the weights and from the settings.

    Raises:
        UserError: the number of heads is not known; no weight shows it.
    """
    n_classes, model_dim = weights["classifier.1.weight"].shape
    projection = weights.get("input_projection.weight")
    numbers = {int(found[1]) for name in weights if (found := re.match(r"transformer_..coder\.layers\.(\d+)\.", name))}
    heads = n_heads or settings.get("n_heads")
    if heads is None:
        raise UserError("the checkpoint does not say how many attention heads its model has. Type: n_heads=NUMBER")
    length = settings.get("context_length") or settings.get("max_length")
    if length is None and "pos_encoding.pe" in weights:
        length = weights["pos_encoding.pe"].shape[-2]
    options = {
        "model_dim": model_dim,
        "n_heads": int(heads),
        "n_layers": max(numbers) + 1,
        "dropout": float(settings.get("dropout", 0.1)),
        "max_length": int(length or 512),
        "pooling": str(settings.get("pooling", "mean")),
        "is_causal": any(name.startswith("transformer_decoder.") for name in weights),
    }
    return options, {
        "embedding_dim": model_dim if projection is None else projection.shape[1],
        "num_classes": n_classes,
    }


def renamed_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names that they have in `Original`.

    >>> list(renamed_weights({"classifier.1.bias": torch.zeros(2), "pos_encoding.pe": torch.zeros(1)}))
    ['head.1.bias']
    """
    return {
        f"{RENAMED[first]}.{rest}": x
        for name, x in weights.items()
        for first, _, rest in [name.partition(".")]
        if first not in LEFT_OUT
    }
