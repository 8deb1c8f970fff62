"""The operations: a folder for each, named after its public function. To add one, copy a folder; these are its files.

- `__init__.py`: names the public functions.
- `api.py`: these functions, which check arguments and choose a backend, and the autograd Function under them.
- `common.py`: operands and options, and what the backends share.
- `reference.py`: the formula in plain PyTorch, and its gradient written out under the names that the Function calls.
- `schema.py`: the operators that torch sees, with what they return, and what calls them. One namespace of torch.ops is
  for compiled kernels, of which torch chooses by the device, another for Triton's.
- `cpu.py`, `triton.py`, `cuda.py`: a backend each, imported when it first serves. A backend has the operations whose
  folders have its file. Triton kernels stand in `triton.py`, or beside it in a `triton_<subject>.py` for each subject.
  C++ and CUDA ones stand in csrc: `<operation>.h`, `.cpp`, `_bindings.cpp`, and `.cu`.

Three things stand beside the folder:

- sample calls and error budgets, in iio_kernels/testing/<operation>.py;
- the functions' names, in iio_kernels/__init__.py;
- how it is measured, in bench/operations/<operation>.py, if it is.

Tests, benchmarks and packages find the operation by its folder. tests/ops/test_every_operation.py holds it to what
every operation keeps.
"""
