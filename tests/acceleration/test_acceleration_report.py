"""What users of `accelerate` see of it: a report that begins with what was done, and none of the tracer's thoughts."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

import iio_kernels
from iio_kernels import accelerate
from iio_kernels.acceleration import Entry, Report, inductor
from iio_kernels.runtime import entry_point
from iio_kernels.testing.families.locatello import Locatello


@functools.lru_cache
def scale(width: int) -> float:
    return width**-0.5


class AutoEncoder(nn.Module):
    """Slot attention, and a decoder whose masks compete."""

    def __init__(self) -> None:
        super().__init__()
        self.slot_attention = Locatello(2, 3, 10, 8, 12)
        self.decoder = nn.Linear(8, 7 * 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.decoder(self.slot_attention(x * scale(x.shape[-1]))).unflatten(-1, (7, 4))
        masks = out[..., 3:].softmax(1)
        return (out[..., :3] * masks).sum(1)


def test_a_report_begins_with_what_was_accelerated():
    report = accelerate(AutoEncoder(), torch.randn(2, 7, 10))
    assert report.accelerated == ["slot_attention"]
    first, last = str(report).splitlines()
    assert first.split()[:3] == ["slot_attention", "Locatello", "accelerated"]
    assert last.split()[:5] == ["(the", "model)", "AutoEncoder", "other", "softmax"]


def test_a_report_is_in_the_order_of_what_became_of_modules():
    entries = [
        Entry("", "A", False, "its logits are not a product of two tensors times a number"),
        Entry("b", "B", False, "it is ordinary attention"),
        Entry("c", "C", True, "1 x slot_attention"),
        Entry("d", "D", True, "2 x slot_attention"),
    ]
    assert [line.split()[0] for line in str(Report(entries)).splitlines()] == ["c", "d", "b", "(the"]


NOISY = """
import functools, sys, warnings
import torch
from torch import nn
import iio_kernels

@functools.lru_cache
def scale(width):
    return width**-0.5

class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        warnings.warn("of the module's own", stacklevel=2)
        if x.sum().item() == 0.5:
            x = x + 1
        A = (self.to_q(x[:, :3]) @ self.to_k(x).mT * scale(x.shape[-1])).softmax(1) + 1e-8
        return A / A.sum(-1, keepdim=True) @ self.to_v(x)

module = Module()
report = iio_kernels.accelerate(module, torch.randn(2, 7, 8))
print("accelerated", report.accelerated, file=sys.stderr)
for n in (7, 9):
    module(torch.randn(2, n, 8))
module(torch.randn(3, 5, 8, requires_grad=True))
"""


def run(code: str) -> subprocess.CompletedProcess:
    environment = {name: x for name, x in os.environ.items() if not name.startswith(("TORCH", "PYTHONWARN"))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.long
def test_nothing_of_the_tracer_reaches_stderr():
    """What torch.compile warns of and logs while it traces: an `.item()`, a cached function. Of the module itself its
    trials are not heard, its calls are."""
    done = run(NOISY)
    assert done.returncode == 0, done.stderr
    first, *others = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("  ")]
    assert first == "accelerated ['']", done.stderr
    assert others
    assert all("of the module's own" in line for line in others), done.stderr


FROM_A_CLONE = """
import importlib.metadata as metadata, sys

# As if there were no other copy that is installed.
found = metadata.MetadataPathFinder.find_distributions
metadata.MetadataPathFinder.find_distributions = classmethod(
    lambda cls, *context: (d for d in found(*context) if d.metadata["Name"].replace("-", "_") != "iio_kernels")
)
import iio_kernels

assert "torch._dynamo" not in sys.modules
import torch

compiled = torch.compile(torch.nn.Linear(2, 2), backend="iio_kernels")
from torch._dynamo.backends.registry import lookup_backend
from iio_kernels.acceleration import inductor

assert lookup_backend("iio_kernels") is inductor
assert metadata.version("iio_kernels") == iio_kernels.__version__
"""


@pytest.mark.long
def test_the_backend_has_its_name_in_a_clone():
    done = run(FROM_A_CLONE)
    assert done.returncode == 0, done.stderr


IN_OTHER_PLACES = (
    FROM_A_CLONE
    + """
from importlib.metadata import distributions, entry_points

def names(**context):
    return [found.metadata["Name"] for found in distributions(**context)]

assert names(path=[EMPTY]) == names(path=[]) == names(name="torch", path=[EMPTY]) == []
assert "iio_kernels" not in names(name="torch")
for name in ("iio_kernels", "iio-kernels", "IIO.Kernels"):
    assert names(name=name) == ["iio_kernels"], name
assert names().count("iio_kernels") == names(path=list(sys.path)).count("iio_kernels") == 1
assert [point.name for point in entry_points(group="torch_dynamo_backends", name="iio_kernels")] == ["iio_kernels"]
assert "iio_kernels" in torch._dynamo.list_backends()
"""
)


@pytest.mark.long
def test_other_places_hold_no_distribution(tmp_path):
    done = run(f"EMPTY = {str(tmp_path)!r}\n{IN_OTHER_PLACES}")
    assert done.returncode == 0, done.stderr


def test_the_backend_has_its_name_after_torch_has_looked(monkeypatch: pytest.MonkeyPatch):
    from torch._dynamo.backends import registry

    monkeypatch.setattr(registry, "_BACKENDS", {})
    monkeypatch.setattr(registry, "_COMPILER_FNS", {})
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    entry_point.announce()
    assert registry.lookup_backend("iio_kernels") is inductor


def test_one_distribution_is_one():
    """Beside an installed copy the name means the same, once."""
    from importlib.metadata import entry_points, version

    (point,) = entry_points(group="torch_dynamo_backends", name="iio_kernels")
    assert point.load() is inductor
    assert version("iio_kernels") == iio_kernels.__version__


def test_warnings_that_are_errors_do_not_stop_a_trace():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch._dynamo.reset()
        assert accelerate(AutoEncoder(), torch.randn(2, 7, 10)).accelerated == ["slot_attention"]
