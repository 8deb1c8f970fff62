"""The operations, a folder each. To add one, copy a folder; these are its files.

- `__init__.py`: the public functions, which check arguments and choose a backend, and the autograd Function under them.
- `reference.py`: the formula in plain PyTorch, and its gradient written out. Every backend offers what the Function
  calls, under the same names.
- `spec.py`: sample inputs, the error allowed, and the sizes of benchmarks with the bytes and operations they take.
- `schema.py`: the operators that torch sees, with what they return, and what calls them. One namespace of torch.ops is
  for compiled kernels, of which torch chooses by the device, another for Triton's.
- `cpu.py`, `triton.py`, `cuda.py`: a backend each, imported when it first serves. Triton kernels stand in `triton.py`,
  C++ and CUDA ones in csrc: `<operation>.h`, `.cpp`, `_bindings.cpp`, and `.cu` (called through `compiled.py`).

Beside the folder: its functions in `iio_kernels/__init__.py`, its name in `backends.py`, in the package list of
pyproject.toml and in `tests/conftest.py`, the formula as printed in `tests/literal.py`, tests in
`tests/test_<operation>.py`, its types in `tests/calls.py` and `tests/test_types.py`, calls to compile for absent GPUs
in `tests/launches.py`, a benchmark in `bench/test_operations.py`, and its place in `bench/gpu.py` and `bench/gpu.sh`.
"""
