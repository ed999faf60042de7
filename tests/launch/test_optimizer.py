"""Our AdamW is torch's to the bit, and does not import torch's compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hethub.launch.optimizer import AdamW, adamw, decay_groups
from tests.launch.pool import SETTINGS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_torchs_own_to_the_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = {"matrix": torch.randn(5, 7, generator=generator), "norm": torch.randn(7, generator=generator)}
    ours, theirs = ({name: [w.to(dtype).clone()] for name, w in start.items()} for _ in range(2))
    mine = AdamW(decay_groups(ours, {"matrix"}, SETTINGS), SETTINGS)
    torchs = adamw(theirs, {"matrix"}, SETTINGS)
    for step in range(6):
        mine.learning_rate = 1e-2 / (step + 1)
        for group in torchs.param_groups:
            group["lr"] = mine.learning_rate
        for name, weight in start.items():
            gradient = torch.randn(weight.shape, generator=generator).to(dtype)
            ours[name][0].grad, theirs[name][0].grad = gradient.clone(), gradient.clone()
        if step == 3:
            ours["norm"][0].grad = theirs["norm"][0].grad = None
        mine.step()
        torchs.step()
        mine.forget_gradients()
        assert all(torch.equal(ours[name][0], theirs[name][0]) for name in start)
        assert ours["matrix"][0].grad is None


def test_a_worker_that_updates_has_not_imported_the_compiler() -> None:
    """Which takes a second of CPU in the start of every worker."""
    script = """
import sys, torch
from hethub.launch import worker
from hethub.launch.optimizer import AdamW, decay_groups
from tests.launch.pool import SETTINGS
weight = torch.ones(3)
weight.grad = torch.ones(3)
AdamW(decay_groups({"w": [weight]}, set(), SETTINGS), SETTINGS).step()
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
