"""Steps in float16: one with infinite gradients changes nothing, and the host need not know of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ehr_embed.training.precision import Autocast
from ehr_embed.training.sharding import load_optimizer


def steps(numbers: list[float], *, fused: bool, clips: bool, patch: pytest.MonkeyPatch) -> tuple[list[Tensor], float]:
    """The weights after a step for each number, as the trainer makes them, and the scale of the gradients."""
    torch.manual_seed(0)
    precision, model = Autocast("16-mixed", "cpu"), nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    for number in numbers:
        precision.backward(model(torch.full((4, 3), number)).square().sum(), model)
        with patch.context() as inside:
            if fused:
                inside.setattr(Tensor, "item", lambda self: pytest.fail("the host waits for a number"))
            if clips:
                precision.unscale_gradients(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=False)
            precision.optimizer_step(optimizer)
        optimizer.zero_grad()
    assert precision.scaler is not None
    return [p.detach().clone() for p in model.parameters()], precision.scaler.get_scale()


@pytest.mark.parametrize("clips", [True, False])
def test_the_host_does_not_wait_to_skip_a_step(clips, monkeypatch):
    found, scale = steps([1.0, float("inf"), 2.0], fused=True, clips=clips, patch=monkeypatch)
    plain, plain_scale = steps([1.0, float("inf"), 2.0], fused=False, clips=clips, patch=monkeypatch)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(found, steps([1.0, 2.0], fused=True, clips=clips, patch=monkeypatch)[0])
    assert scale == plain_scale == 2.0**15
    assert not torch.allclose(found[0], steps([1.0], fused=True, clips=clips, patch=monkeypatch)[0][0])


def test_a_run_whose_steps_were_not_fused_goes_on():
    """A checkpoint of a version that did not fuse the steps of float16 is loaded into an optimizer that does."""
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    earlier, now = (
        torch.optim.AdamW([w], lr=0.1, fused=is_new) for w, is_new in zip(weights, (False, True), strict=True)
    )
    weights[0].grad = torch.ones(3)
    earlier.step()
    load_optimizer(now, copy.deepcopy(earlier.state_dict()))
    weights[1].data = weights[0].data.clone()
    assert now.param_groups[0]["fused"]
    for weight, optimizer in zip(weights, (earlier, now), strict=True):
        weight.grad = torch.full((3,), 2.0)
        optimizer.step()
    torch.testing.assert_close(*weights)


def test_a_state_with_more_groups_than_the_optimizer_is_refused():
    saved = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(3)])
    now = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(2)])
    with pytest.raises(ValueError, match="groups"):
        load_optimizer(now, saved.state_dict())
