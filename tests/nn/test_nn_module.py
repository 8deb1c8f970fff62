"""What `nn.SlotAttention` promises as a module: parameters, copies, compilers, distribution."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conventions import DX, OPTIONS, B, D, H, K, N, assert_all_close, compiles, example, make, masks, ours, results
from torch._dynamo.testing import CompileCounterWithBackend

from iio_kernels.nn import SlotAttention


def test_parameters_are_those_of_the_options():
    def names(**options):
        return {name: tuple(x.shape) for name, x in SlotAttention(6, 8, num_slots=5, **options).named_parameters()}

    plain = names()
    assert list(plain) == [
        "mu", "log_sigma", "norm_inputs.weight", "norm_inputs.bias", "norm_slots.weight", "norm_slots.bias",
        "norm_mlp.weight", "norm_mlp.bias", "to_q.weight", "to_k.weight", "to_v.weight", "gru.weight_ih",
        "gru.weight_hh", "gru.bias_ih", "gru.bias_hh", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias",
    ]  # fmt: skip
    assert names(bias=True).keys() - plain.keys() == {"to_q.bias", "to_k.bias", "to_v.bias"}
    assert names(combine_heads=True).keys() - plain.keys() == {"combine.weight", "combine.bias"}
    assert plain.keys() - names(mlp_size=None, norm_inputs=False, update="residual").keys() == {
        name for name in plain if name.startswith(("mlp", "norm_mlp", "norm_inputs", "gru"))
    }
    assert plain.keys() - names(initial="given").keys() == {"mu", "log_sigma"}
    assert names(initial="queries")["mu"] == names(initial="gaussians")["log_sigma"] == (5, 8)
    wide = names(kvq_size=12, heads=3)
    assert (wide["to_k.weight"], wide["gru.weight_ih"]) == ((12, 6), (24, 12))


def test_copies_keep_options_and_weights():
    options = {"heads": 2, "gradient": "bilevel", "attention": "weights"}
    module, (inputs, slots) = make(torch.float32, **options), example(torch.float32)
    expected = module(inputs, slots)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    fresh = SlotAttention(DX, D, num_slots=K, mlp_size=H, **options)
    fresh.load_state_dict(module.state_dict())
    for other in (
        copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False), fresh,
    ):  # fmt: skip
        assert all(map(torch.equal, other(inputs, slots), expected))
        assert repr(other) == repr(module)
    state = {name: 2 * x for name, x in module.state_dict().items()}
    fresh.load_state_dict(state)
    got = torch.func.functional_call(module, state, (inputs, slots))
    assert all(map(torch.equal, got, fresh(inputs, slots)))


@pytest.mark.parametrize("options", [{"heads": 2}, {"project": False}], ids=str)
def test_pickles_of_the_time_when_nn_was_one_file(options):
    module = SlotAttention(D, D, num_slots=K, **options)
    pickled = pickle.dumps(module, 2)
    for new, old in (("slot_attention\nSlotAttention", "\nSlotAttention"), ("layers\nIdentity", "\n_Identity")):
        pickled = pickled.replace(f"iio_kernels.nn.{new}".encode(), f"iio_kernels.nn{old}".encode())
    assert b"iio_kernels.nn." not in pickled
    inputs, slots = torch.randn(B, N, D), torch.randn(B, K, D)
    assert torch.equal(pickle.loads(pickled)(inputs, slots), module(inputs, slots))


def test_meta_and_no_gradient():
    """Nothing looks at a value; frozen parameters have no gradient."""
    with torch.device("meta"):
        module = SlotAttention(6, 8, attention="softmax", backend="reference")
        out, attention = module(torch.empty(2, 5, 6))
    assert (out.shape, attention.shape) == ((2, 7, 8), (2, 7, 5))
    module, (inputs, slots) = make().requires_grad_(False), example()
    assert not module(inputs, slots).requires_grad
    assert module(inputs.requires_grad_(), slots).requires_grad
    with torch.no_grad():
        assert not make()(inputs, slots).requires_grad


@pytest.mark.parametrize("name", ["defaults", "joint heads", "bilevel"])
def test_data_parallel(name):
    """Every parameter has its gradient, twice over: DistributedDataParallel finds none that is unused."""
    module, (inputs, _) = make(torch.float32, **OPTIONS[name]), example(torch.float32)
    noise = torch.randn(B, K, D)
    expected = torch.autograd.grad(module(inputs, noise=noise).square().sum(), list(module.parameters()))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(module)
        for _ in range(2):
            module.zero_grad()
            parallel(inputs, noise=noise).square().sum().backward()
            for parameter, gradient in zip(module.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, gradient)
    finally:
        torch.distributed.destroy_process_group()


@compiles
@pytest.mark.parametrize(
    ("name", "compiler"),
    [("defaults", "inductor"), *((name, "aot_eager") for name in ("joint heads", "no MLP at last", "bilevel"))],
)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.long)])
def test_compiled_whole(name, compiler, backend):
    torch._dynamo.reset()
    module = make(torch.float32, **OPTIONS[name], attention="weights", backend=backend)
    tensors, given_masks = example(torch.float32), masks()
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    for arguments in ({}, given_masks):
        got = results(lambda _, *x, **options: compiled(*x, **options), module, *tensors, **arguments)
        assert_all_close(got, results(ours, module, *tensors, **arguments), 1e-5)


@pytest.mark.long
@compiles
@pytest.mark.parametrize("name", ["defaults", "joint heads"])
def test_compiled_once_for_all_numbers_of_inputs(name):
    torch._dynamo.reset()
    module = make(torch.float32, **OPTIONS[name], attention="softmax", backend="cpu")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for n in (13, 20, 57):
        tensors = example(torch.float32, n=n)
        got = results(lambda _, *x: compiled(*x), module, *tensors)
        assert_all_close(got, results(ours, module, *tensors), 1e-5)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert len(set(counts)) == 1


@compiles
@pytest.mark.parametrize("name", ["defaults", "joint heads", "bilevel"])
def test_exported(name):
    module, tensors = make(torch.float32, **OPTIONS[name], attention="softmax"), example(torch.float32)
    sizes = {1: torch.export.Dim("N", min=2)}
    program = torch.export.export(module, tensors, dynamic_shapes={"inputs": sizes, "slots": None})
    for n in (N, 29):
        inputs, slots = example(torch.float32, n=n)
        torch.testing.assert_close(program.module()(inputs, slots), module(inputs, slots))


def test_importing_takes_no_triton():
    """On a machine without a GPU, nor does a call: torch itself may have imported it."""
    program = (
        "import sys, torch; before = 'triton' in sys.modules\n"
        "import iio_kernels\n"
        "iio_kernels.nn.SlotAttention(4, 4)(torch.randn(1, 5, 4)).sum().backward()\n"
        "print(before, 'triton' in sys.modules)"
    )
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    before, after = out.stdout.split()
    assert before == after
