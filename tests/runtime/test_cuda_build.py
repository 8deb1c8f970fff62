"""Building the CUDA kernels: what nvcc makes of them, and what is said where something is missing."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from building import behave, finish, needs_kernels, start

from iio_kernels.runtime import build, compilation, libraries

# --- nvcc ---------------------------------------------------------------------------------------------------


def nvcc() -> list[str] | None:
    try:
        return build.find_nvcc()
    except build.BuildError:
        return None


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="no nvcc")

#: A100, H100 and H200, B200. One intermediate code for all three: that is what takes the longest.
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}

#: Of what ptxas reports, a kernel's name, architecture, spills, registers and shared memory.
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<more>[^\n]*)",
    re.DOTALL,
)


#: The names of those kernels whose numbers grow with the masks.
SUBSETS = r"(subsetsILNS_5StageE\d+E|entropiesI)Li(?P<masks>\d+)ELi\dE(?P<type>[fd])E"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, list[dict[str, str]]]:
    """The library, and what ptxas says of each kernel."""
    folder = tmp_path_factory.mktemp("cuda")
    # A CPU's PyTorch has no libtorch_cuda: one that has the function they take from there.
    stub = folder / "stub.cpp"
    stub.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = 0, 0; }')
    command = [*build.find_compiler(), "-shared", "-fPIC", str(stub), "-o", str(folder / "libtorch_cuda.so")]
    subprocess.run(command, check=True)
    with pytest.MonkeyPatch.context() as patch:
        flags = [f"-gencode=arch=compute_80,code={architecture}" for architecture in sorted(ARCHITECTURES)]
        patch.setattr(libraries, "architectures", lambda: [*flags, "-Xptxas=-v"])
        patch.setattr(libraries, "TORCH_LIBRARIES", [f"-L{folder}", *libraries.TORCH_LIBRARIES])
        said = compilation.make(folder, build.CUDA.sources(), libraries.cuda_edges(build.find_compiler(), nvcc()))
    return folder / "library.so", [match.groupdict() for match in REPORT.finditer(said)]


@pytest.mark.long
@needs_nvcc
def test_kernels_fit_into_registers(built):
    _, kernels = built
    assert {kernel["architecture"] for kernel in kernels} == ARCHITECTURES
    # 15 numbers of masks: three visits of subsets and the entropies, in float for 1 channel and mostly for 3, and in
    # double for 1. Two visits of listed subsets of any number of masks, for as many channels. Then products and finish,
    # for 5 taps a side and any, and five more, for both types.
    assert len(kernels) == len(ARCHITECTURES) * (15 * (4 + 3 + 4) + 2 * 3 + 2 * (2 * 2 + 4))
    for kernel in kernels:
        assert "smem" not in kernel["more"]  # all of it is dynamic, at most 96 KB: see iio_loss.cu
        subsets = re.search(SUBSETS, kernel["name"])
        if subsets is None or (subsets["type"] == "f" and int(subsets["masks"]) <= 8):
            assert kernel["stores"] == kernel["loads"] == "0", kernel
        assert int(kernel["registers"]) <= 255


@pytest.mark.long
@needs_nvcc
def test_the_library_loads_and_says_what_it_lacks(built, tmp_path):
    library, _ = built
    program = f"""
import ctypes, torch
import iio_kernels.ops.iio_loss.compiled
torch.ops.load_library({str(library)!r})
print(torch._C._dispatch_has_kernel_for_dispatch_key("iio_kernels::iio_loss", "CUDA"))
trouble = ctypes.CDLL({str(library)!r}).iio_kernels_cuda_trouble
trouble.restype = ctypes.c_char_p
print(trouble() if not torch.cuda.is_available() else b"CUDA")
"""
    out, _ = finish(start(tmp_path, "c++", program, LD_LIBRARY_PATH=str(library.parent)))
    registered, trouble = out.splitlines()
    assert registered == "True"
    assert "CUDA" in trouble


# --- where something is missing -----------------------------------------------------------------------------

#: A PyTorch that sees a GPU.
GPU = """
import torch
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_capability = lambda device=None: (9, 0)
"""

#: What of the CUDA backend a program sees, after a call on the CPU.
PROGRAM = """
import torch, iio_kernels
iio_kernels.iio_loss(torch.rand(1, 1, 11, 11), torch.rand(1, 2, 11, 11), backend="reference")
print("imported")
print("cuda:", iio_kernels.backends()["cuda"])
try:
    iio_kernels.runtime.backends.choose("iio_loss", "cuda", torch.device("cuda"))
except RuntimeError as error:
    print(error)
"""


@pytest.fixture
def fake_nvcc(tmp_path, compiler) -> Path:
    """An nvcc of no delay, as test_build's compiler: what it links says what is in the file `trouble`."""
    (tmp_path / "bin").mkdir()
    source, path = tmp_path / "trouble.cpp", tmp_path / "bin" / "nvcc"
    path.write_text(
        textwrap.dedent(f"""\
        #!{sys.executable}
        import pathlib, subprocess, sys
        here = pathlib.Path({str(tmp_path)!r})
        if "--version" in sys.argv:
            print("nvcc: an nvcc for tests\\nCopyright\\nCuda compilation tools, release 13.0")
            sys.exit()
        with (here / "nvcc calls").open("a") as calls:
            calls.write(" ".join(sys.argv[1:]) + "\\n")
        if (here / "behaviour").read_text() == "fail":
            sys.exit("nvcc fatal   : Unsupported gpu architecture 'compute_90'")
        out = sys.argv[sys.argv.index("-o") + 1]
        if "-c" in sys.argv:
            pathlib.Path(out).touch()
        else:
            command = [*{build.find_compiler()!r}, "-shared", "-fPIC", {str(source)!r}, "-o", out]
            subprocess.run(command, check=True, env={{"PATH": {os.environ["PATH"]!r}}})
        """)
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    says(tmp_path, "0")
    return path


def says(folder: Path, trouble: str) -> None:
    (folder / "trouble.cpp").write_text(f'extern "C" const char* iio_kernels_cuda_trouble() {{ return {trouble}; }}')


def run(folder: Path, compiler: Path | str, program: str, **environment: str) -> tuple[list[str], str]:
    environment = {"CUDA_HOME": str(folder), "PATH": "/nowhere", "TMPDIR": str(folder), **environment}
    program = "import warnings; warnings.simplefilter('always')\n" + program
    out, errors = finish(start(folder / "cache", compiler, program, **environment))
    imported, *lines = out.splitlines()
    assert imported == "imported"
    return lines, "\n".join(line for line in errors.splitlines() if "CUDA" in line)


def test_a_pytorch_without_cuda(tmp_path):
    program = "import torch; torch.version.cuda = None\n" + PROGRAM
    lines, errors = run(tmp_path, "c++", program)
    reason = "this PyTorch was built without CUDA"
    assert lines == [f"cuda: {reason}", f"backend: 'cuda' cannot be used: {reason}"]
    assert errors == ""


def test_no_gpu(tmp_path):
    program = GPU + "torch.cuda.is_available = lambda: False\n" + PROGRAM
    lines, errors = run(tmp_path, "c++", program)
    assert lines == ["cuda: there is no GPU", "backend: 'cuda' cannot be used: there is no GPU"]
    assert errors == ""


@pytest.mark.skipif(Path("/usr/local/cuda/bin/nvcc").exists(), reason="there is one")
def test_no_nvcc(tmp_path):
    lines, errors = run(tmp_path, "c++", GPU + PROGRAM)
    assert all("there is no nvcc: install the CUDA toolkit" in line for line in lines)
    assert errors == ""


@pytest.mark.long
@needs_kernels
def test_it_is_built_once_for_this_machines_gpus(tmp_path, compiler, fake_nvcc):
    lines, errors = run(tmp_path, compiler, GPU + PROGRAM)
    assert lines == ["cuda: None"]
    assert f"compiling the CUDA kernels with {compiler} and {fake_nvcc}, once, in about a minute" in errors
    *compiled, linked = (tmp_path / "nvcc calls").read_text().splitlines()
    assert sorted(re.search(r"-DIIO_REAL=(\w+)", call)[1] for call in compiled) == ["double", "float"]
    assert all(call.count("-gencode=arch=compute_90,code=sm_90") == 1 for call in compiled)
    assert "-ltorch_cuda" in linked
    lines, errors = run(tmp_path, compiler, GPU + PROGRAM)
    assert lines == ["cuda: None"]
    assert errors == ""
    # Another GPU, another library.
    lines, errors = run(tmp_path, compiler, GPU.replace("(9, 0)", "(10, 0)") + PROGRAM)
    assert lines == ["cuda: None"]
    assert "compute_100" in (tmp_path / "nvcc calls").read_text()


@pytest.mark.long
@needs_kernels
def test_tensors_on_the_cpu_build_nothing_for_a_gpu(tmp_path, compiler, fake_nvcc):
    program = PROGRAM.split("print")[0].replace("reference", "auto") + "print('imported')"
    lines, errors = run(tmp_path, compiler, GPU + program)
    assert lines == []
    assert errors == ""
    assert not (tmp_path / "nvcc calls").exists()


@pytest.mark.long
@needs_kernels
def test_an_nvcc_that_fails_is_told_once(tmp_path, compiler, fake_nvcc):
    program = "import iio_kernels.runtime.build as b; b.missing()\n" + GPU + PROGRAM
    run(tmp_path, compiler, "import iio_kernels.runtime.build as b; b.missing()\nprint('imported')")
    behave(compiler, "fail")
    lines, errors = run(tmp_path, compiler, program)
    assert all("nvcc failed: nvcc fatal : Unsupported gpu architecture 'compute_90'" in line for line in lines)
    assert errors.count("RuntimeWarning: iio_kernels: the CUDA kernels are not available") == 1


@pytest.mark.long
@needs_kernels
def test_a_driver_that_is_too_old(tmp_path, compiler, fake_nvcc):
    says(tmp_path, '"CUDA driver version is insufficient for CUDA runtime version"')
    lines, errors = run(tmp_path, compiler, GPU + PROGRAM)
    assert all("the compiled kernels do not run: CUDA driver version is insufficient" in line for line in lines)
    assert errors.count("RuntimeWarning") == 1
