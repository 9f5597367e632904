"""Numeric precision: where bfloat16 is worth it, and what must not be rounded to it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning_fabric.plugins.precision import MixedPrecision

from ehr_embed.core.errors import unknown_name

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


def choose_precision(wanted: str, accelerator: str) -> str:
    """`auto` becomes bf16-mixed where the hardware multiplies bfloat16 natively (CPUs with AVX512-BF16 or AMX too).

    Raises:
        UserError: not one of `PRECISIONS`.
    """
    if wanted not in PRECISIONS:
        raise unknown_name("trainer.precision", wanted, PRECISIONS)
    if wanted != "auto":
        return wanted
    on_cuda = accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else _cpu_multiplies_bf16()
    return "bf16-mixed" if fast else "32-true"


def autocast_of_run(wanted: str, used: str | None, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a model predicts on `device` as its run did when it was evaluated.

    Where the run chose half precision by itself and this device is not fast at it, the model predicts in float32.

    Args:
        wanted: the run's `trainer.precision`.
        used: what that became; None = not known.

    >>> type(autocast_of_run("auto", "32-true", torch.device("cpu"))).__name__
    'nullcontext'
    """
    here = choose_precision(wanted, device.type)
    if wanted == "auto" and used not in (None, here):
        here = "32-true"
    if here == "bf16-mixed":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    if here == "16-mixed" and device.type == "cuda":
        return torch.autocast(device.type, dtype=torch.float16)
    return nullcontext()


class Autocast(MixedPrecision):
    """Mixed precision that leaves a model's inputs as they are.

    Fabric's own rounds every floating input of a bf16-mixed model to bfloat16, whose eight bits cannot tell 365 days from
    366: times and values would be blurred in training, and sharp wherever the model is called without Fabric.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def precision_plugin(accelerator: str, precision: str) -> Autocast | None:
    """What makes a Fabric compute in `precision` and rounds no input; None for 32-true. Neither argument is `auto`."""
    if precision == "32-true":
        return None
    return Autocast(precision=precision, device="cpu" if accelerator == "cpu" else "cuda")  # type: ignore[arg-type]


def _cpu_multiplies_bf16() -> bool:
    # Private in torch, and absent from some versions; without it float32 is the safe answer.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)
