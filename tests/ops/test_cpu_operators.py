"""What the compiled CPU operators are to torch: opcheck, compiled code, derivatives, wrong calls refused."""

from __future__ import annotations

import re

import pytest
import torch
from cpu_operators import (
    BROADCAST,
    DEFINED,
    F32,
    GOOD,
    HOW,
    INPAINTING,
    _one_thread,  # noqa: F401
    call,
    ops,
)
from torch import Tensor

from iio_kernels import (
    conditional_entropies,
    iio_loss,
    interaction_information,
    slot_attention,
    slot_attention_from_inputs,
)
from iio_kernels.testing import iio_loss as iio_spec
from iio_kernels.testing import slot_attention as attention_spec


@pytest.mark.parametrize(("operator", "how"), HOW, ids=str)
def test_opcheck(operator, how):
    torch.library.opcheck(getattr(ops, operator).default, (), GOOD[operator](**how))


def test_every_operator_is_called_here():
    assert set(GOOD) == DEFINED


MUTATIONS = {
    "a dimension more": lambda x: x.unsqueeze(0),
    "a dimension less": lambda x: x[0],
    "int64": lambda x: x.to(torch.int64),
    "float16": lambda x: x.half(),
    **{f"size {d} one more": lambda x, d=d: torch.cat([x, x.narrow(d, 0, 1)], d) for d in range(5)},
    **{f"size {d} zero": lambda x, d=d: x.narrow(d, 0, 0) for d in range(5)},
}
#: What is a good call too: no other argument shares the size.
STILL_GOOD = {("slot_attention_forward", "v", f"size 3 {change}") for change in ("one more", "zero")}
STILL_GOOD |= {(operator, "image", "size 1 one more") for operator in INPAINTING if operator != "inpaint_backward"}
STILL_GOOD |= {(operator, "masks", "size 1 one more") for operator in INPAINTING if "backward" not in operator}
STILL_GOOD |= {("sampled_iio_loss", "pairs", "int64")}
STILL_GOOD |= {(f"{name}_forward", "decoded", "size 1 one more") for name in ("composition", "mixture")}  # K
STILL_GOOD |= {("broadcast_forward", "constant", f"size 0 {change}") for change in ("one more", "zero")}
STILL_GOOD |= {("broadcast_forward", "position_map", f"size {d} one more") for d in (0, 1)}  # classes are the same
STILL_GOOD |= {("iterations_forward", "x", f"size 1 {change}") for change in ("one more", "zero")}  # N
STILL_GOOD |= {("iterations_forward", "slots", "size 1 one more"), ("iterations_backward", "tape", "size 1 one more")}
WRONG = [
    (operator, name, mutation)
    for operator in GOOD
    for name, x in GOOD[operator]().items()
    for mutation in (MUTATIONS if isinstance(x, Tensor) else ())
    if (operator, name, mutation) not in STILL_GOOD
    and not (mutation.startswith("size") and int(mutation.split()[1]) >= x.dim())
]


def words(error: pytest.ExceptionInfo) -> str:
    """The message, without the place in the source that torch puts before it."""
    return re.sub(r"^.*\.(cpp|h):\d+, ", "", str(error.value))


@pytest.mark.parametrize(("operator", "name", "mutation"), WRONG)
def test_a_wrong_tensor_is_refused(operator, name, mutation):
    arguments = GOOD[operator]()
    arguments[name] = MUTATIONS[mutation](arguments[name])
    with pytest.raises(RuntimeError) as caught:
        call(operator, arguments)
    # Of two that do not fit each other either may be named.
    names = [other for other, x in arguments.items() if isinstance(x, Tensor)] if "size" in mutation else [name]
    spelled = {"masks": "masks?", "grad": "gradient", "x": "(x|w[pi])", "slots": "(slots|w[pij12])"}
    spelled |= {"d_slots": "(d_slots|w[pij12])", "tape": "(tape|iterations)"}
    assert re.search(rf"\b({'|'.join(spelled.get(x, x) for x in names)})\b", words(caught)), words(caught)


WRONG_OPTIONS = [
    *(("sigma", sigma) for sigma in (0.0, -1.0, float("nan"))),
    *(("kernel_size", size) for size in (4, 0, -1, -3, 13, 2**40 + 1)),
    *(("repeats", repeats) for repeats in (0, -1)),
]


@pytest.mark.parametrize(("name", "value"), WRONG_OPTIONS)
@pytest.mark.parametrize("operator", INPAINTING)
def test_a_wrong_option_is_refused(operator, name, value):
    with pytest.raises(RuntimeError) as caught:
        call(operator, GOOD[operator]() | {name: value})
    assert words(caught).startswith(name)


@pytest.mark.parametrize("operator", BROADCAST)
@pytest.mark.parametrize("name", ["rows", "columns"])
@pytest.mark.parametrize("value", [[1, 2], [1, 0, 1], [-1, 5, 0], [0, 5, -1], [9, 1, 2], [2**62, 1, 2**62]])
def test_wrong_classes_are_refused(operator, name, value):
    with pytest.raises(RuntimeError) as caught:
        call(operator, GOOD[operator]() | {name: value})
    assert words(caught).startswith(name)


@pytest.mark.parametrize("K", [1, 17, 33, 70])
@pytest.mark.parametrize(
    "operator", ["iio_loss", "sampled_iio_loss", "conditional_entropies", "conditional_entropies_backward"]
)
def test_a_wrong_number_of_masks_is_refused(operator, K):
    most = 32 if operator == "sampled_iio_loss" else 16
    if 1 < K <= most:
        pytest.skip("not so many")
    arguments = GOOD[operator]()
    arguments["masks"] = torch.rand(2, K, 11, 13)
    with pytest.raises(RuntimeError, match=f"expected 2 to {most} masks, got {K}"):
        call(operator, arguments)


# --- torch.compile ------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", [slot_attention, iio_loss], ids=lambda function: function.__name__)
def test_compiles_to_code(function, dynamic):
    """All the way through Inductor, forward and backward."""
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: function(*x, backend="cpu"), fullgraph=True, dynamic=dynamic)
    for size in (13, 16) if dynamic else (13,):
        case = attention_spec.Case("compiled", N=size) if function is slot_attention else iio_spec.Case("", K=2, H=size)
        tensors, _ = case.make(F32)
        leaves = [x.requires_grad_() for x in tensors]
        y, expected = compiled(*leaves), function(*leaves, backend="cpu")
        torch.testing.assert_close(y, expected)
        grad = torch.randn(y.shape)
        for x, exact in zip(*(torch.autograd.grad(out, leaves, grad) for out in (y, expected)), strict=True):
            torch.testing.assert_close(x, exact)


# --- derivatives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [conditional_entropies, interaction_information])
@pytest.mark.parametrize("K", [2, 3, 4])
def test_gradcheck_of_entropies(function, K):
    options = {"sigma": 1.0, "kernel_size": 3, "eps": 1e-3}
    tensors, options = iio_spec.Case("small", B=1, C=2, K=K, H=4, W=5, options=options).make()
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: function(*x, backend="cpu", **options), leaves)


@pytest.mark.parametrize("case", attention_spec.SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_gradcheck_from_inputs(case, biases):
    tensors, options = attention_spec.from_inputs(case, "cpu", biases)
    leaves = [x if x is None else x.requires_grad_() for x in tensors]

    def function(*leaves):
        return slot_attention_from_inputs(*leaves, return_attention=True, backend="cpu", **options)

    assert torch.autograd.gradcheck(function, leaves)
