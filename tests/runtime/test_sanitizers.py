"""The kernels for CPUs as other compilers see them: for arm64, and with sanitizers of memory and behaviour."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from test_build import finish, needs_kernels, start

from iio_kernels.runtime import build
from iio_kernels.runtime.build import libraries
from iio_kernels.runtime.build.ninja import compile_library, find_ninja


@pytest.mark.long
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no compiler for arm64")
def test_it_compiles_for_arm64(tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "INSTRUCTION_SETS", {"baseline": []})
    objects, link = libraries.commands(["aarch64-linux-gnu-g++"])
    link = [part for part in link if not part.startswith(("-l", "-L"))]  # torch's own libraries are this machine's
    library = compile_library(find_ninja(), tmp_path, build.CPU.files(), libraries.Commands(objects, link))
    machine = library.read_bytes()[18:20]
    assert int.from_bytes(machine, "little") == 183  # EM_AARCH64


def sanitizer_runtime(compiler: str) -> str | None:
    """The AddressSanitizer library, which must be loaded before Python; None where there is none."""
    done = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True)
    return done.stdout.strip() if Path(done.stdout.strip()).is_absolute() else None


@pytest.mark.long
@needs_kernels
def test_sanitizers_find_nothing(tmp_path):
    """Every case forward and backward in a build that stops at the first bad access or undefined operation."""
    compiler = build.find_compiler()[0]
    runtime = sanitizer_runtime(compiler)
    if runtime is None:
        pytest.skip(f"{compiler} has no AddressSanitizer")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]
    commands = libraries.commands([compiler], [*libraries.FLAGS, "-O1", *sanitize])
    best = build.instruction_set()
    for command in commands.compile.values():
        if any(part.startswith("-DIIO_ISA=") and part != f"-DIIO_ISA={best}" for part in command):
            command[:] = [part for part in command if part not in sanitize]  # not run here: it has to link
            command.append("-O0")
    compile_library(find_ninja(), tmp_path, build.CPU.files(), commands)
    program = f"""
import torch
torch.ops.load_library({str(tmp_path / "library.so")!r})
import iio_kernels.runtime.build as b
b._load = lambda library: None
import iio_kernels
from iio_kernels.testing.broadcast_conv2d import CASES as broadcast
from iio_kernels.testing.compose import CASES as composition
from iio_kernels.testing.iio_loss import CASES as iio
from iio_kernels.testing.slot_attention_module import CASES as iterations
from iio_kernels.testing.spatial_mixture import CASES as mixture
from iio_kernels.testing.slot_attention import CASES as attention
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for case in attention:
        tensors, options = case.make(dtype)
        leaves = [x.requires_grad_() for x in tensors]
        for x in (leaves, leaves[:2] + leaves[1:2]):
            U, A = iio_kernels.slot_attention(*x, backend="cpu", return_attention=True, **options)
            (U.sum() + A.square().sum()).backward()
    for case in iio:
        tensors, options = case.make(dtype)
        leaves = [x.requires_grad_() for x in tensors]
        iio_kernels.iio_loss(*leaves, backend="cpu", **options).backward()
        iio_kernels.conditional_entropies(*leaves, backend="cpu", **options).sum().backward()
        iio_kernels.inpaint(*leaves, backend="cpu", **options).sum().backward()
    for case in composition:
        tensors, options = case.make(dtype)
        leaves = [x.requires_grad_() for x in tensors]
        error, masks = iio_kernels.composition_error(*leaves, backend="cpu", return_masks=True, **options)
        reconstruction, _ = iio_kernels.compose(leaves[1], backend="cpu")
        (error + masks.square().sum() + reconstruction.sum()).backward()
    for case in mixture:
        tensors, options = case.make(dtype)
        results = iio_kernels.spatial_mixture(*(x.requires_grad_() for x in tensors), backend="cpu", **options)
        sum(x.square().sum() for x in results[:3]).backward()
    for case in broadcast:
        tensors, options = case.make(dtype)
        leaves = [x.requires_grad_() for x in tensors]
        iio_kernels.broadcast_conv2d(*leaves, backend="cpu", **options).square().sum().backward()
    for case in iterations:
        (x, slots, weights, T), options = case.make(dtype)
        options |= {{"return_attention": True, "backend": "cpu"}}
        slots, A = iio_kernels.slot_attention_module(x.requires_grad_(), slots, weights, T, **options)
        (slots.sum() + A.square().sum()).backward()
print("clean")
"""
    environment = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0,verify_asan_link_order=0"}
    out, _ = finish(start(tmp_path / "cache", compiler, program, **environment))
    assert out.strip() == "clean"
