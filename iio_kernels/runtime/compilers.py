"""The compilers: C++'s and CUDA's, where they are and what they say of themselves."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys

from iio_kernels.runtime.build_errors import BuildError, NoCompiler, one_line


def find_compiler() -> list[str]:
    """The C++ compiler, with arguments if it has any: $CXX, or the first of c++, g++ and clang++."""
    if os.name == "nt":
        raise NoCompiler("they are built on Linux and macOS only")
    asked = os.environ.get("CXX", "").strip()
    try:
        candidates = ([asked], shlex.split(asked)) if asked else (["c++"], ["g++"], ["clang++"])
    except ValueError as error:
        raise NoCompiler(f"CXX is {asked!r}, which is not a command: {error}") from None
    for command in candidates:
        if path := shutil.which(os.path.expanduser(command[0])):
            return [os.path.abspath(path), *command[1:]]
    if asked:
        raise NoCompiler(f"CXX names {asked!r}, which is not a program that can be run")
    how = "`xcode-select --install`" if sys.platform == "darwin" else "`apt install g++` or your system's like of it"
    raise NoCompiler(f"there is no C++ compiler: install one with {how}, or name it in CXX")


def find_nvcc() -> list[str]:
    """CUDA's compiler: in $CUDA_HOME, on the PATH, or where CUDA puts it."""
    home = os.path.expanduser(os.environ.get("CUDA_HOME", ""))
    for folders in (home and os.path.join(home, "bin"), os.environ.get("PATH"), "/usr/local/cuda/bin"):
        if folders and (path := shutil.which("nvcc", path=folders)):
            return [os.path.abspath(path)]
    raise NoCompiler("there is no nvcc: install the CUDA toolkit, or name its folder in CUDA_HOME")


def compiler_version(compiler: list[str]) -> str:
    """The line that tells the version in what the compiler says of itself."""
    try:
        done = subprocess.run(
            [*compiler, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler {' '.join(compiler)} does not run: {one_line(str(error))}") from None
    if done.returncode != 0:
        raise BuildError(f"the compiler {' '.join(compiler)} does not run: {one_line(done.stderr)}")
    lines = done.stdout.splitlines() or [""]
    return next((line for line in lines if "release" in line), lines[0])  # nvcc's own; elsewhere the first


def compilers_hash(compilers: list[list[str]]) -> str:
    parts = [(compiler, compiler_version(compiler)) for compiler in compilers]
    return hashlib.blake2b(repr(parts).encode(), digest_size=4).hexdigest()
