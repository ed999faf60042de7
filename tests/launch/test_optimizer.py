"""Our AdamW is torch's within rounding, and does not import torch's compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hethub.launch.optimizer import AdamW, adamw, decay_groups, joined
from tests.launch.pool import SETTINGS


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_steps_are_those_of_torchs_own(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    """Within rounding, since the kernel is another."""
    generator = torch.Generator().manual_seed(0)
    start = {"matrix": torch.randn(5, 7, generator=generator), "norm": torch.randn(7, generator=generator)}
    ours, theirs = ({name: [w.to(dtype).clone()] for name, w in start.items()} for _ in range(2))
    mine = AdamW(decay_groups(ours, {"matrix"}, SETTINGS), SETTINGS)
    torchs = adamw(theirs, {"matrix"}, SETTINGS)
    for step in range(6):
        rate = 1e-2 / (step + 1)
        for group in torchs.param_groups:
            group["lr"] = rate
        for name, weight in start.items():
            gradient = torch.randn(weight.shape, generator=generator).to(dtype)
            ours[name][0].grad, theirs[name][0].grad = gradient.clone(), gradient * scale
        mine.step(rate, scale)
        torchs.step()
        for name in start:
            torch.testing.assert_close(ours[name][0], theirs[name][0], rtol=tolerance, atol=tolerance)


def test_a_tensor_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        AdamW([([torch.ones(4, 4)[:, :2]], 0.0)], SETTINGS)


def test_neighbours_in_one_storage_are_joined() -> None:
    whole = torch.arange(12.0)
    views = [whole[0:4].view(2, 2), whole[4:6], whole[8:12].view(2, 2), torch.ones(2)]
    found = joined(views)
    assert [t.tolist() for t in found] == [[0, 1, 2, 3, 4, 5], [8, 9, 10, 11], [1, 1]]
    assert found[0].data_ptr() == whole.data_ptr()


def test_a_worker_that_updates_has_not_imported_the_compiler() -> None:
    """Which takes a second of CPU in the start of every worker."""
    script = """
import sys, torch
from hethub.launch import worker
from hethub.launch.optimizer import AdamW, decay_groups
from tests.launch.pool import SETTINGS
weight = torch.ones(3)
weight.grad = torch.ones(3)
AdamW(decay_groups({"w": [weight]}, set(), SETTINGS), SETTINGS).step(1e-3, 1.0)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
