"""The modules of the field and `nn.SlotAttention`: the same results from the same weights, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iio_kernels.nn import SlotAttention, convert_weights
from iio_kernels.testing.families import FAMILIES, OUTSIDE
from iio_kernels.testing.families.family import Size

GIVEN = {"initial": "given"}
SHOWN = {"attention": "softmax"}
DENOMINATOR = {"eps_in": "denominator"}
#: Each family in the options of `nn.SlotAttention`; sizes are the same for all.
OPTIONS: dict[str, Callable[[Size], dict[str, Any]]] = {
    "locatello": lambda s: {"norm_eps": 1e-3},
    "lucidrains": lambda s: {"bias": True},
    "lucidrains_multi_head": lambda s: {"bias": True, "heads": s.heads, "kvq_size": s.Dk, "combine_heads": True},
    "evelinehong": lambda s: {"bias": True},
    "vadimkantorov": lambda s: {"bias": True, "update": "replace", "mlp_size": None},
    "vadimkantorov_residual": lambda s: {"bias": True, "update": "residual", "mlp_size": None},
    "oclf": lambda s: {"bias": True, "heads": s.heads, "joint_heads": True, "kvq_size": s.Dk,
                       "attention_heads": "mean"} | GIVEN | SHOWN,
    "slate": lambda s: {"heads": s.heads, "joint_heads": True, "attention_layout": "NK"} | GIVEN | SHOWN,
    "spot": lambda s: {"heads": s.heads, "joint_heads": True, "attention_layout": "NK", "initial": "queries",
                       "gradient": "bilevel"} | SHOWN,
    "steve": lambda s: {"mlp_last": False, "attention_layout": "NK"} | SHOWN,
    "videosaur": lambda s: {"kvq_size": s.Dk, "normalized_state": True} | GIVEN | SHOWN,
    "slotformer": lambda s: {"eps": 1e-6} | GIVEN,
    "savi": lambda s: {"heads": s.heads, "joint_heads": True, "kvq_size": s.Dk,
                       "attention_heads": "separate"} | GIVEN | SHOWN | DENOMINATOR,
    "denominator": lambda s: {"eps": 1e-5} | GIVEN | SHOWN | DENOMINATOR,
    "bo_qsa": lambda s: {"initial": "queries", "gradient": "bilevel", "attention_layout": "NK"} | SHOWN | DENOMINATOR,
    "genera1z": lambda s: {"eps": 1e-5} | GIVEN | SHOWN | DENOMINATOR,
}  # fmt: skip
each_family = pytest.mark.parametrize("name", FAMILIES)
#: What has no gradient where its authors draw with `torch.normal`.
WITHOUT_GRADIENT = {"evelinehong": ("mu", "log_sigma")}


def both(name: str) -> tuple[nn.Module, SlotAttention, tuple, dict]:
    """A family's module, our own with its weights, and an example of what the first is called with."""
    family = FAMILIES[name]
    s = family.small
    theirs = family.make(s)
    with torch.no_grad():
        for parameter in theirs.parameters():  # no bias 0, no normalisation without weights
            parameter += 0.3 * torch.rand_like(parameter)
    sizes = {"num_slots": s.K, "iterations": s.T, "mlp_size": s.H}
    ours = SlotAttention(s.Dx, s.D, **(sizes | OPTIONS[name](s)))
    ours.load_state_dict(convert_weights(of_the_module(theirs.state_dict()), ours.state_dict()))
    return theirs, ours, *family.arguments(s)


def of_the_module(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without STEVE's predictor, which stands between the frames."""
    return {name: x for name, x in state.items() if not name.startswith("predictor")}


def outputs(result: Any) -> tuple[Tensor, ...]:
    """Slots, and attention where it is returned; SPOT's logits are its own."""
    result = tuple(result.values()) if isinstance(result, dict) else result
    return result[:2] if isinstance(result, tuple) else (result,)


def call_ours(name: str, ours: SlotAttention, theirs: nn.Module, args: tuple, options: dict, noise: Tensor) -> Any:
    if name == "steve":
        slots, found = ours.draw(noise), []
        for frame in args[0].unbind(1):
            found.append(ours(frame, slots))
            slots = theirs.predictor(found[-1][0])
        return tuple(torch.stack(x, 1) for x in zip(*found, strict=True))
    if name in ("savi", "videosaur"):
        args = args[::-1]
    names = {"mask": "input_mask", "smask": "slot_mask", "slots_mask": "slot_mask"}
    options = {names.get(option, option): x for option, x in options.items()}
    if name == "oclf":
        options["slot_mask"] = ~options["slot_mask"]
    return ours(*args, **options, **({"noise": noise} if FAMILIES[name].draws else {}))


def results(call: Callable, module: nn.Module, args: tuple) -> tuple[tuple[Tensor, ...], tuple, dict[str, Tensor]]:
    """Outputs, gradients to the tensors in args, and to the module's own parameters, from random ones."""
    leaves = [x.detach().requires_grad_() for x in args]
    parameters = of_the_module(dict(module.named_parameters()))
    out = outputs(call(*leaves))
    random = torch.Generator().manual_seed(1)
    incoming = [(torch.rand(x.shape, generator=random) - 0.5).to(x) for x in out]
    gradients = torch.autograd.grad(
        out, [*leaves, *parameters.values()], incoming, allow_unused=True, materialize_grads=True
    )
    to_leaves, to_parameters = gradients[: len(leaves)], gradients[len(leaves) :]
    return tuple(x.detach() for x in out), to_leaves, dict(zip(parameters, to_parameters, strict=True))


@each_family
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_converted_weights_give_the_same(name, autocast, monkeypatch):
    """Slots, attention and all gradients: to twice the rounding of the module itself, against it in float64."""
    theirs, ours, args, options = both(name)
    s = FAMILIES[name].small
    noise = torch.randn(s.B, options.get("num_slots", s.K), s.D)
    # Whatever a module draws, it draws this.
    monkeypatch.setattr(torch, "randn", lambda *_, dtype=None, **__: noise.to(dtype))
    monkeypatch.setattr(torch, "normal", lambda mean, std: mean.detach() + std.detach() * noise.to(mean))
    monkeypatch.setattr(torch.Tensor, "normal_", lambda x: x.copy_(noise))

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager = results(lambda *x: theirs(*x, **options), theirs, args)
        got = results(lambda *x: call_ours(name, ours, theirs, x, options, noise), ours, args)
    exact = results(lambda *x: theirs(*x, **options), theirs.double(), tuple(x.double() for x in args))
    like = dict(ours.named_parameters())
    found = []
    for of in (got[2], eager[2], exact[2]):
        found.append({k.replace("slots_sigma", "slots_logsigma"): x for k, x in of.items()})
        found[-1] = convert_weights(found[-1], like)
    of_outputs = {f"output {i}": x for i, x in enumerate(zip(got[0], eager[0], exact[0], strict=True))}
    gradients = {f"argument {i}": x for i, x in enumerate(zip(got[1], eager[1], exact[1], strict=True))}
    gradients |= {key: tuple(of[key] for of in found) for key in like if key not in WITHOUT_GRADIENT.get(name, ())}
    # What all queries have in common the softmax over slots takes away: the gradient to a bias of theirs is 0, of terms
    # that cancel, and so errors of gradients are measured by the largest of all.
    unit = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    for compared in (of_outputs, gradients):
        largest = max(truth.abs().max() for _, _, truth in compared.values())
        for key, (x, rounded, truth) in compared.items():
            assert x.shape == truth.shape
            assert (x.double() - truth).abs().max() <= 2 * (rounded - truth).abs().max() + 4 * unit * largest, key


@each_family
def test_weights_go_there_and_back(name):
    theirs, ours, *_ = both(name)
    before = of_the_module(theirs.state_dict())
    after = convert_weights(ours.state_dict(), before)
    assert list(after) == list(before)
    for key, x in before.items():
        if key == "slots_sigma":  # of which the logarithm is kept
            torch.testing.assert_close(after[key], x)
        else:
            assert torch.equal(after[key], x), key
    again = convert_weights(after, ours.state_dict())
    assert list(again) == list(ours.state_dict())


def test_every_family_has_its_options():
    assert OPTIONS.keys() == FAMILIES.keys()
    assert not OPTIONS.keys() & OUTSIDE.keys()


@pytest.mark.parametrize("name", [*FAMILIES, *OUTSIDE])
def test_families_run_and_learn(name):
    """At the small size: finite results of the sizes of the slots, and a gradient to every parameter."""
    family = (FAMILIES | OUTSIDE)[name]
    module = family.make(family.small)
    args, options = family.arguments(family.small)
    slots = outputs(module(*args, **options))[0]
    assert slots.shape[-1] == family.small.D
    assert slots.isfinite().all()
    slots.square().sum().backward()
    without = {key for key, x in module.named_parameters() if x.grad is None or not x.grad.any()}
    assert without == ({"slots_mu", "slots_sigma"} if name == "evelinehong" else set())


# --- what cannot be converted ----------------------------------------------------------------------------------------


def test_a_prefix_does_not_matter():
    _, ours, *_ = both("slotformer")
    theirs = FAMILIES["slotformer"].make(FAMILIES["slotformer"].small).state_dict()
    prefixed = {f"model.slot_attention.{name}": x for name, x in theirs.items()}
    expected = convert_weights(theirs, ours.state_dict())
    assert all(torch.equal(x, expected[name]) for name, x in convert_weights(prefixed, ours.state_dict()).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.conv.weight": (3, 3)}, r"weights: expected.*got decoder.conv.weight \(3, 3"),
        ({"head_q.weight": (8, 8)}, "weights: expected one.*project_q.weight and head_q.weight"),
        ({"project_k.bias": (8,)}, "weights: expected what like has, got project_k.bias beyond it$"),
        ({"gru.bias_hh": None}, "weights: expected what like has, got nothing for gru.bias_hh$"),
        ({"project_k.weight": (8, 11)}, r"\(8, 10\) for to_k.weight, got \(8, 11\) in project_k"),
        ({"mlp.4.weight": (8, 8)}, "two layers of an MLP, got mlp.0, mlp.2, mlp.4"),
    ],
)
def test_weights_of_something_else_are_refused(change, message):
    theirs, ours, *_ = both("locatello")
    shapes = {name: x.shape for name, x in theirs.state_dict().items()} | change
    weights = {name: torch.zeros(shape) for name, shape in shapes.items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        convert_weights(weights, ours.state_dict())


@pytest.mark.parametrize("name", OUTSIDE)
def test_those_outside_are_refused_where_their_parameters_are_others(name):
    """ISA's are; a Sinkhorn module's are those of Slot Attention, and only the mathematics is another."""
    state = OUTSIDE[name].make(Size()).state_dict()
    like = SlotAttention(10, 8, mlp_size=12, initial="given").state_dict()
    if name == "sinkhorn":
        assert convert_weights(state, like).keys() == like.keys()
    else:
        with pytest.raises(ValueError, match="project_grid"):
            convert_weights(state, like)
