"""Chooses the numeric precision of training, and keeps a model's inputs from being rounded to bfloat16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import torch
from lightning_fabric.plugins.precision import MixedPrecision
from torch.optim import Optimizer

from ehr_embed.core.settings import OneOf, check_setting

Precision = Annotated[str, OneOf("auto", "32-true", "bf16-mixed", "16-mixed")]


def choose_precision(wanted: str, accelerator: str) -> str:
    """Return the precision to use; `auto` is bf16-mixed on hardware that multiplies bfloat16 natively, else 32-true.

    Such hardware includes CPUs with AVX512-BF16 or AMX.

    Raises:
        UserError: `wanted` is no `Precision`.
    """
    check_setting("trainer.precision", wanted, Precision)
    if wanted != "auto":
        return wanted
    on_cuda = accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else _cpu_multiplies_bf16()
    return "bf16-mixed" if fast else "32-true"


def autocast_of_run(wanted: str, used: str | None, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a model predicts on `device` in the precision of its run's evaluation.

    A run with `trainer.precision=auto` that used another precision than this device would choose predicts in float32.

    Args:
        wanted: the run's `trainer.precision`.
        used: the precision that the run used; None = unknown.

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
    """Mixed precision that leaves a model's inputs unchanged.

    Fabric's plugin rounds every floating-point input of a bf16-mixed model to bfloat16, whose eight bits cannot
    distinguish 365 days from 366. Times and values would be rounded in training, but not when the model is called
    without Fabric.
    """

    def convert_input(self, data: Any) -> Any:
        return data

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Scale float16's gradients back before they are clipped.

        Fabric refuses it for fused optimizers, since these can do it in their step. torch's scaler tells them that it is done, and
        lets them skip a step with infinite gradients on the device; for other optimizers the host waits in each step to know.
        """
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)


def precision_plugin(accelerator: str, precision: str) -> Autocast | None:
    """Return the plugin with which Fabric computes in `precision`, or None for 32-true; no argument may be `auto`."""
    if precision == "32-true":
        return None
    return Autocast(precision=precision, device="cpu" if accelerator == "cpu" else "cuda")  # type: ignore[arg-type]


def _cpu_multiplies_bf16() -> bool:
    # These functions are private in torch and absent from some versions; without them float32 is the safe choice.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)
