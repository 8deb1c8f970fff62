"""`nn.SlotAttention` in every convention, beside the formula as printed: what its tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving import SERVING
from torch import Tensor

from iio_kernels.nn import SlotAttention
from iio_kernels.testing.slot_attention_layer import literal_slot_attention_layer
from iio_kernels.testing.slot_attention_module import random_like

NAN = float("nan")


# torch.compile itself makes an instance of every Function that it traces.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


each_backend = pytest.mark.parametrize("serving", SERVING, indirect=True, ids="-".join)


#: Sizes of the tests, whose slots are as wide as the module's queries unless an option says otherwise.
B, N, K, DX, D, H, T = 2, 13, 3, 6, 8, 10, 3


#: What the literal formula needs to know of a module.
FORMULA = (
    "heads", "scale", "eps", "eps_in", "normalize", "softmax", "joint_heads", "update", "normalized_state",
    "mlp_last", "norm_eps", "gradient",
)  # fmt: skip


#: A row for each option, and for combinations that somebody publishes.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "eps": {"eps": 0.1},
    "eps of 0": {"eps": 0.0},
    "eps in the denominator": {"eps": 0.1, "eps_in": "denominator"},
    "sum": {"normalize": "sum"},
    "scale": {"scale": 0.7},
    "norm_eps": {"norm_eps": 0.1},
    "scale, heads": {"scale": 0.7, "heads": 2},
    "norm_eps, heads": {"norm_eps": 0.1, "heads": 2},
    "bias": {"bias": True},
    "narrow": {"kvq_size": 6},
    "wide": {"kvq_size": 12},
    "heads": {"heads": 2},
    "joint heads": {"heads": 4, "joint_heads": True},
    "heads combined": {"heads": 3, "kvq_size": 12, "combine_heads": True, "bias": True},
    "one head combined": {"combine_heads": True},
    "residual": {"update": "residual"},
    "replace": {"update": "replace", "mlp_size": None},
    "replace of combined heads": {"update": "replace", "heads": 2, "kvq_size": 6, "combine_heads": True},
    "updates normalised": {"norm_updates": True},
    "sum of combined heads, normalised": {
        "normalize": "sum",
        "norm_updates": True,
        "heads": 3,
        "kvq_size": 12,
        "combine_heads": True,
    },
    "normalised state": {"normalized_state": True},
    "residual on normalised state": {"update": "residual", "normalized_state": True},
    "no MLP": {"mlp_size": None},
    "no MLP at last": {"mlp_last": False},
    "no MLP at last, heads": {"mlp_last": False, "heads": 2},
    "inputs as they are": {"norm_inputs": False},
    "inputs as they are, heads": {"norm_inputs": False, "heads": 2},
    "slots as they are": {"norm_slots": False},
    "no normalisation": {"norm_inputs": False, "norm_slots": False, "norm_mlp": False},
    "softmax over inputs": {"softmax": "inputs"},
    "softmax over inputs, heads, bias": {"softmax": "inputs", "heads": 2, "bias": True},
    "implicit": {"gradient": "implicit"},
    "implicit, heads": {"gradient": "implicit", "heads": 2, "joint_heads": True},
    "bilevel": {"gradient": "bilevel"},
    "bilevel, no MLP at last": {"gradient": "bilevel", "mlp_last": False},
    "bilevel in the denominator": {"gradient": "bilevel", "eps_in": "denominator", "eps": 0.1},
    "one iteration": {"iterations": 1},
    "one iteration, implicit": {"iterations": 1, "gradient": "implicit"},
    "one iteration, bilevel": {"iterations": 1, "gradient": "bilevel"},
    "one iteration, no MLP": {"iterations": 1, "mlp_last": False},
}


each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(dtype: torch.dtype = torch.float64, device: str = "cpu", **options: Any) -> SlotAttention:
    """A module whose parameters are all random, biases and normalisations too."""
    module = SlotAttention(DX, D, **({"num_slots": K, "iterations": T, "mlp_size": H} | options))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            offset = 1 if name.startswith("norm") and name.endswith("weight") else 0
            parameter.copy_(offset + 0.5 * torch.randn(parameter.shape, generator=random))
    return module.to(device, dtype)


def example(
    dtype: torch.dtype = torch.float64, device: str = "cpu", *batch: int, n: int = N, k: int = K
) -> tuple[Tensor, Tensor]:
    """inputs and slots."""
    random = torch.Generator().manual_seed(4)
    batch = batch or (B,)
    shapes = (*batch, n, DX), (*batch, k, D)
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype) for shape in shapes)


def masks(device: str = "cpu") -> dict[str, Tensor]:
    """One slot and some inputs of each image are out; (B, K) and (B, N)."""
    random = torch.Generator().manual_seed(5)
    return {
        "slot_mask": torch.tensor([[True, False, True], [True, True, False]], device=device),
        "input_mask": (torch.rand(B, N, generator=random) < 0.7).to(device),
    }


def results(function, module: SlotAttention, inputs: Tensor, slots: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """What `function(module, inputs, slots, **arguments)` returns, and all gradients."""
    leaves = [x.detach().requires_grad_() for x in (inputs, slots)]
    names, parameters = zip(*module.named_parameters(), strict=True)
    outputs = function(module, *leaves, **arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(
        outputs, [*leaves, *parameters], random_like(*outputs), allow_unused=True, materialize_grads=True
    )
    named = dict(zip(("inputs", "slots", *names), gradients, strict=True))
    return dict(zip(("out", "attention"), (x.detach() for x in outputs), strict=False)) | named


def ours(module: SlotAttention, inputs: Tensor, slots: Tensor, **arguments: Any) -> Any:
    return module(inputs, slots, **arguments)


def formula(module: SlotAttention, inputs: Tensor, slots: Tensor, **arguments: Any) -> Any:
    """The literal formula, in the module's options."""
    batch = inputs.shape[:-2]
    inputs, slots = (x.reshape(-1, *x.shape[-2:]) for x in (inputs, slots))
    options = {name: getattr(module, name) for name in FORMULA}
    out, A, W = literal_slot_attention_layer(
        dict(module.named_parameters()), inputs, slots, module.iterations, **options, **arguments
    )
    out = out.view(*batch, *out.shape[1:])
    if module.attention is None:
        return out
    shown = {"softmax": A, "weights": W}[module.attention]
    if module.attention_heads != "separate":
        shown = shown.sum(1) if module.attention_heads == "sum" else shown.mean(1)
    shown = shown if module.attention_layout == "KN" else shown.transpose(-2, -1)
    return out, shown.reshape(*batch, *shown.shape[1:])


def assert_all_close(got: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-10) -> None:
    assert got.keys() == expected.keys()
    for name, x in got.items():
        y = expected[name]
        scale = max(y.abs().max().item(), 1) if y.numel() else 1
        torch.testing.assert_close(x, y, rtol=0, atol=relative * scale, msg=lambda text, name=name: f"{name}: {text}")
