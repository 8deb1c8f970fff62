"""Slot attention against the literal formula, and the properties it promises."""

from __future__ import annotations

import literal
import pytest
import torch
from comparing import comparison
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iio_kernels import SlotAttentionFunction, slot_attention, slot_attention_from_inputs
from iio_kernels.ops.slot_attention.common import Options
from iio_kernels.testing.slot_attention import BENCHMARKS, CASES, Case, allowed_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# torch.compile itself makes an instance of every Function that it traces.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
MASKED = [case for case in CASES if case.slots != "all" or case.inputs != "all"]


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def results(function, tensors, incoming=None, **options) -> tuple[Tensor, ...]:
    """U, A and the gradients to q, k, v; those to U and A are `incoming`, else random (fixed seed)."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    outputs = function(*leaves, **options)
    if incoming is None:
        random = torch.Generator().manual_seed(1)
        incoming = [torch.randn(x.shape, generator=random).to(x) for x in outputs]
    # Of nothing at all (no images, everything masked) the literal formula has no graph.
    pairs = [(x, g) for x, g in zip(outputs, incoming, strict=True) if x.requires_grad]
    gradients = [torch.zeros_like(x) for x in leaves]
    if pairs:
        gradients = torch.autograd.grad(
            [x for x, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, materialize_grads=True
        )
    return *(x.detach() for x in outputs), *gradients


def run(tensors, backend: str, incoming=None, **options) -> tuple[Tensor, ...]:
    return results(slot_attention, tensors, incoming, backend=backend, return_attention=True, **options)


NAMES = ("U", "A", "dq", "dk", "dv")


assert_all_close = comparison(NAMES, 1e-11)


# --- the formula --------------------------------------------------------------------------------------------


@each_case
def test_equals_the_literal_formula(case, backend, device):
    tensors, options = case.make(device=device)
    assert_all_close(run(tensors, backend, **options), results(literal.slot_attention, tensors, **options))


@each_case
@each_dtype
def test_error_is_within_budget(case, dtype, backend, device):
    tensors, options = case.make(dtype, device)
    random = torch.Generator().manual_seed(2)
    shapes = [(*x.shape[:-1], d) for x, d in ((tensors[0], case.Dv), (tensors[0], case.N))]
    incoming = [torch.randn(shape, generator=random).to(dtype).to(device) for shape in shapes]
    got = run(tensors, backend, incoming, **options)
    eager = results(literal.slot_attention, tensors, incoming, **options)
    doubles = [x.double() for x in tensors], [x.double() for x in incoming]
    truth = results(literal.slot_attention, *doubles, **options)
    for name, x, plain, exact in zip(NAMES, got, eager, truth, strict=True):
        assert x.dtype == dtype
        assert x.shape == exact.shape
        if exact.numel():
            allowed = allowed_error(exact, plain)
            if case.N == 1 and name in ("dq", "dk"):
                # The only input has weight 1 whatever q and k: through U their gradient is the rounding of
                # equal terms that cancel, which the literal formula never adds.
                allowed += 100 * torch.finfo(dtype).eps
            assert (x.double() - exact).abs().max() <= allowed, name


@pytest.mark.parametrize("dtypes", [(16, 32, 64), (32, 16, 16), (64, 32, 16), (16, 0, 32)])
def test_mixed_dtypes(dtypes, backend, device):
    kinds = {0: torch.bfloat16, 16: torch.float16, 32: torch.float32, 64: torch.float64}
    (q, k, v), _ = Case("mixed").make(device=device)
    tensors = [x.to(kinds[bits]) for x, bits in zip((q, k, v), dtypes, strict=True)]
    got = run(tensors, backend)
    assert [x.dtype for x in got] == [kinds[dtypes[i]] for i in (2, 2, 0, 1, 2)]
    exact = results(literal.slot_attention, [x.double() for x in tensors])
    for x, y in zip(got, exact, strict=True):
        # The incoming gradients were rounded to v's dtype as well.
        finest = torch.finfo(x.dtype).eps + torch.finfo(got[0].dtype).eps
        assert (x.double() - y).abs().max() <= 4 * finest * y.abs().max()


def test_scale_defaults_to_the_width_of_a_key(backend, device):
    (q, k, v), _ = Case("scale", Dk=9, Dv=4).make(device=device)
    torch.testing.assert_close(
        slot_attention(q, k, v, backend=backend), slot_attention(q, k, v, scale=1 / 3, backend=backend)
    )


def test_joint_heads_is_one_softmax_over_concatenated_slots(backend, device):
    (q, k, v), _ = Case("joint", batch=(2, 3), K=4, N=13).make(device=device)
    U, A = slot_attention(q, k, v, joint_heads=True, return_attention=True, backend=backend)
    logits = torch.cat([q[:, h] @ k[:, h].mT / 4 for h in range(3)], 1)
    expected = logits.softmax(1).unflatten(1, (3, 4))
    torch.testing.assert_close(A, expected)
    W = expected + 1e-8
    torch.testing.assert_close(U, (W / W.sum(-1, keepdim=True)) @ v)
    assert not torch.allclose(A, slot_attention(q, k, v, return_attention=True, backend=backend)[1])


def test_attention_is_that_before_eps(backend, device):
    (q, k, v), _ = Case("eps").make(device=device)
    _, small = slot_attention(q, k, v, return_attention=True, backend=backend)
    _, large = slot_attention(q, k, v, eps=10.0, return_attention=True, backend=backend)
    assert torch.equal(small, large)
    torch.testing.assert_close(small.sum(-2), torch.ones_like(small[:, 0]))


def test_attention_does_not_change_the_update(backend, device):
    (q, k, v), _ = Case("attention").make(device=device)
    U, _ = slot_attention(q, k, v, return_attention=True, backend=backend)
    assert torch.equal(slot_attention(q, k, v, backend=backend), U)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(used, backend, device):
    """The other's incoming gradient is absent, not zero."""
    tensors, _ = Case("one output", Dv=7).make(device=device)
    gradients = []
    for function in (slot_attention, literal.slot_attention):
        leaves = [x.clone().requires_grad_() for x in tensors]
        options = {"backend": backend, "return_attention": True} if function is slot_attention else {}
        output = function(*leaves, **options)[used].square().sum()
        gradients.append(torch.autograd.grad(output, leaves, allow_unused=True, materialize_grads=True))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_of_some_inputs(wanted, backend, device):
    tensors, _ = Case("some").make(device=device)
    everything = run(tensors, backend)[2:]
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    outputs = slot_attention(*leaves, return_attention=True, backend=backend)
    random = torch.Generator().manual_seed(1)
    incoming = [torch.randn(x.shape, generator=random).to(x) for x in outputs]
    # With v alone the attention is a constant of the reference.
    pairs = [(x, g) for x, g in zip(outputs, incoming, strict=True) if x.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    for i, leaf in enumerate(leaves):
        if i in wanted:
            torch.testing.assert_close(leaf.grad, everything[i])
        else:
            assert leaf.grad is None


# --- from inputs ----------------------------------------------------------------------------------------------


def from_inputs(case, device, biases=True, joint_heads=False):
    """x, q, wk, bk, wv, bv and the options of a case, keys and values projected from inputs 6 wide."""
    (q, _, _), options = case.make(device=device)
    random = torch.Generator().manual_seed(4)
    heads = (case.batch[-1],) if joint_heads else ()
    shapes = [(*case.batch, case.N, 6), q.shape, (*heads, case.Dk, 6), (*heads, case.Dk), (*heads, case.Dv, 6)]
    shapes.append((*heads, case.Dv))
    x, _, wk, bk, wv, bv = (torch.randn(shape, generator=random, dtype=q.dtype).to(device) for shape in shapes)
    return (x, q, wk, bk if biases else None, wv, bv if biases else None), options


def check_from_inputs(tensors, options, backend):
    """Outputs and all gradients against keys and values projected first."""

    def projected(x, q, wk, bk, wv, bv, **options):
        k, v = x @ wk.mT, x @ wv.mT
        k, v = k if bk is None else k + bk.unsqueeze(-2), v if bv is None else v + bv.unsqueeze(-2)
        k, v = (y.expand(*q.shape[:-2], *y.shape[-2:]) for y in (k, v))
        return literal.slot_attention(q, k, v, **options)

    got, expected = [], []
    for found, function in ((got, slot_attention_from_inputs), (expected, projected)):
        leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
        own = {"backend": backend, "return_attention": True} if found is got else {}
        U, A = function(*leaves, **options, **own)
        random = torch.Generator().manual_seed(5)
        incoming = [torch.randn(x.shape, generator=random).to(x) for x in (U, A)]
        given = [x for x in leaves if x is not None]
        pairs = [(x, g) for x, g in zip((U, A), incoming, strict=True) if x.requires_grad]
        gradients = [torch.zeros_like(x) for x in given]
        if pairs:
            gradients = torch.autograd.grad(
                [x for x, _ in pairs], given, [g for _, g in pairs], allow_unused=True, materialize_grads=True
            )
        found += [U.detach(), A.detach(), *gradients]
    for x, y in zip(got, expected, strict=True):
        scale = max(y.abs().max().item(), 1) if y.numel() else 1
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11 * scale)


@each_case
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
def test_from_inputs_equals_projecting_first(case, biases, backend, device):
    check_from_inputs(*from_inputs(case, device, biases), backend)


def test_from_inputs_with_heads_of_one_input(backend, device):
    """x without a head dimension of its own, a weight for each head."""
    case = Case("heads", batch=(2, 3), N=13)
    for joint_heads in (False, True):
        (x, *others), options = from_inputs(case, device, joint_heads=True)
        check_from_inputs((x[:, :1], *others), {**options, "joint_heads": joint_heads}, backend)


def test_from_inputs_never_reads_what_is_masked(backend, device):
    tensors, options = from_inputs(case_named("both masks"), device)
    filled = [x.clone() for x in tensors]
    filled[0][~options["input_mask"]] = float("nan")
    filled[1][~options["slot_mask"]] = float("nan")
    results = []
    for inputs in (tensors, filled):
        leaves = [x.clone().requires_grad_() for x in inputs]
        U = slot_attention_from_inputs(*leaves, backend=backend, **options)
        results.append((U.detach(), *torch.autograd.grad(U.square().sum(), leaves)))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_from_inputs_scales_by_the_projected_width(backend, device):
    tensors, _ = from_inputs(Case("scale", Dk=9), device)
    torch.testing.assert_close(
        slot_attention_from_inputs(*tensors, backend=backend),
        slot_attention_from_inputs(*tensors, scale=1 / 3, backend=backend),
    )


def test_from_inputs_keeps_dtypes(backend, device):
    tensors, _ = from_inputs(Case("dtypes"), device)
    for dtype in DTYPES:
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        U, A = slot_attention_from_inputs(*leaves, return_attention=True, backend=backend)
        assert U.dtype == A.dtype == dtype
        assert [x.dtype for x in torch.autograd.grad(U.sum(), leaves)] == [dtype] * 6
        exact = slot_attention_from_inputs(*(x.detach().double() for x in leaves), backend="reference")
        assert (U.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


# --- symmetry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"eps_in": "denominator", "eps": 1.0}, {"normalize": "sum"}], ids=str)
def test_permuting_slots_permutes_updates_and_permuting_inputs_changes_nothing(options, backend, device):
    """Proposition 1 of Slot Attention."""
    (q, k, v), _ = Case("permuted", K=7).make(device=device)
    slots, inputs = torch.randperm(7, device=device), torch.randperm(37, device=device)
    U, A = slot_attention(q, k, v, return_attention=True, backend=backend, **options)
    U_slots, A_slots = slot_attention(q[:, slots], k, v, return_attention=True, backend=backend, **options)
    torch.testing.assert_close(U_slots, U[:, slots])
    torch.testing.assert_close(A_slots, A[:, slots])
    permuted = q, k[:, inputs], v[:, inputs]
    U_inputs, A_inputs = slot_attention(*permuted, return_attention=True, backend=backend, **options)
    torch.testing.assert_close(U_inputs, U)
    torch.testing.assert_close(A_inputs, A[..., inputs])


# --- derivatives --------------------------------------------------------------------------------------------

SMALL = [
    Case("weights", batch=(2,), K=3, N=4, Dk=2, Dv=3, options={"eps": 0.1}),
    Case("denominator", batch=(2,), K=3, N=4, Dk=2, Dv=3, options={"eps": 0.1, "eps_in": "denominator"}),
    Case("sum", batch=(2,), K=3, N=4, Dk=2, Dv=3, options={"normalize": "sum"}),
    Case("joint", batch=(2,), K=2, N=3, Dk=2, Dv=3, options={"joint_heads": True}, slots="some", inputs="some"),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_gradcheck(case, backend, device, interpreted):
    tensors, options = case.make(device=device, seed=3)
    tensors = [x.requires_grad_() for x in tensors]

    def function(*leaves):
        return slot_attention(*leaves, return_attention=True, backend=backend, **options)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=interpreted)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("output", ["update", "attention", "sum"])
def test_second_derivatives_are_the_references_alone(output, backend, device):
    """Also where the incoming gradient is a constant, as that of a sum: nothing passes silently for 0."""
    tensors, _ = Case("twice").make(device=device)
    q, k, v = (x.requires_grad_() for x in tensors)
    U, A = slot_attention(q, k, v, return_attention=True, backend=backend)
    loss = {"update": U.square().sum(), "attention": A.square().sum(), "sum": U.sum()}[output]
    penalty = torch.autograd.grad(loss, q, create_graph=True)[0].square().sum()
    if backend == "reference":
        penalty.backward()
        assert q.grad.abs().max() > 0
    else:
        for way in (lambda: penalty.backward(retain_graph=True), lambda: torch.autograd.grad(loss + penalty, k)):
            with pytest.raises(RuntimeError, match=r"differentiates once.*reference"):
                way()


def test_functional_gradient(backend, device):
    tensors, _ = Case("functional").make(device=device)

    def loss(q, k, v):
        U, A = slot_attention(q, k, v, return_attention=True, backend=backend)
        return U.square().sum() + A.square().sum()

    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*tensors), expected, strict=True):
        torch.testing.assert_close(x, y)


def _strided(x: Tensor, how: str) -> Tensor:
    """The same values under other strides."""
    if how == "transposed":
        return x.mT.contiguous().mT
    if how == "sliced":
        wide = torch.full((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1] + 1), float("nan")).to(x)
        view = wide[..., ::2, 1::3]
        return view.copy_(x)
    if how == "expanded":
        return x[:1].expand_as(x)
    if how == "heads":  # (B, N, H, D) seen as (B, H, N, D)
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    raise ValueError(how)


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "heads"])
@pytest.mark.parametrize("joint_heads", [False, True])
def test_strided_inputs(how, joint_heads, backend, device):
    tensors, _ = Case("strided", batch=(3,), Dv=6).make(device=device)
    strided = [_strided(x, how) for x in tensors]
    assert not any(x.is_contiguous() for x in strided)
    leaves = [x.clone(memory_format=torch.contiguous_format) for x in strided]
    expected = run(leaves, backend, joint_heads=joint_heads)
    views = [x.detach().requires_grad_() for x in strided]
    U, A = slot_attention(*views, joint_heads=joint_heads, return_attention=True, backend=backend)
    random = torch.Generator().manual_seed(1)
    incoming = [torch.randn(x.shape, generator=random).to(x) for x in (U, A)]
    assert_all_close((U, A, *torch.autograd.grad((U, A), views, incoming)), expected)


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_strided_incoming_gradients(how, backend, device):
    tensors, _ = Case("strided", batch=(3,), Dv=6).make(device=device)
    dense = [torch.randn(3, 4, 6, device=device), torch.randn(3, 4, 37, device=device)]
    strided = [_strided(x.double(), how) for x in dense]
    assert not any(x.is_contiguous() for x in strided)
    got = run(tensors, backend, strided)
    assert_all_close(got, run(tensors, backend, [x.contiguous() for x in strided]))


def test_sum_sends_gradients_of_stride_zero(backend, device):
    tensors, _ = Case("stride 0", Dv=6).make(device=device)
    expected = run(
        tensors, backend, [torch.ones(2, 4, 6).double().to(device), torch.ones(2, 4, 37).double().to(device)]
    )
    leaves = [x.clone().requires_grad_() for x in tensors]
    U, A = slot_attention(*leaves, return_attention=True, backend=backend)
    (U.sum() + A.sum()).backward()
    assert_all_close((U, A, *(x.grad for x in leaves)), expected)


def test_one_tensor_for_keys_and_values(backend, device):
    (q, k, _), _ = Case("shared").make(device=device)
    expected = run((q, k, k), backend)
    shared = k.clone().requires_grad_()
    U, A = slot_attention(q, shared, shared, return_attention=True, backend=backend)
    random = torch.Generator().manual_seed(1)
    torch.autograd.backward((U, A), [torch.randn(x.shape, generator=random).to(x) for x in (U, A)])
    torch.testing.assert_close(shared.grad, expected[3] + expected[4])


# --- masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
@pytest.mark.parametrize("filling", [float("nan"), float("inf")])
def test_what_is_masked_is_never_read(case, filling, backend, device):
    tensors, options = case.make(device=device)
    q, k, v = (x.clone() for x in tensors)
    if "slot_mask" in options:
        q[~options["slot_mask"].expand(q.shape[:-1])] = filling
    if "input_mask" in options:
        off = ~options["input_mask"].expand(k.shape[:-1])
        k[off] = v[off] = filling
    expected = run(tensors, backend, **options)
    got = run((q, k, v), backend, **options)
    assert all(x.isfinite().all() for x in got)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_gradients_at_masked_attention_are_never_read(case, backend, device):
    """As log(A) sends them: 0 / 0 where A is 0."""
    tensors, options = case.make(device=device)
    dU, dA = torch.randn(*tensors[0].shape[:-1], case.Dv), torch.randn(*tensors[0].shape[:-1], case.N)
    dU, dA = dU.to(tensors[0]), dA.to(tensors[0])
    off = torch.zeros_like(dA, dtype=torch.bool)
    if "slot_mask" in options:
        off |= ~options["slot_mask"].unsqueeze(-1)
    if "input_mask" in options:
        off |= ~options["input_mask"].unsqueeze(-2)
    expected = run(tensors, backend, (dU, dA.masked_fill(off, 0)), **options)
    got = run(tensors, backend, (dU, dA.masked_fill(off, float("nan"))), **options)
    assert_all_close(got, expected)


@pytest.mark.parametrize("name", ["both masks", "joint heads, masks"])
def test_a_gradient_of_nan_stays_out_of_what_is_masked(name, backend, device):
    tensors, options = case_named(name).make(device=device)
    slots, inputs = options["slot_mask"], options["input_mask"]
    U, A = slot_attention(*tensors, return_attention=True, backend=backend, **options)
    incoming = torch.full_like(U, float("nan")), torch.full_like(A, float("nan"))
    _, _, dq, dk, dv = run(tensors, backend, incoming, **options)
    assert (dq[~slots] == 0).all()
    assert (dk[~inputs] == 0).all()
    assert (dv[~inputs] == 0).all()
    assert dv[inputs].isnan().all()


def test_masked_slots_and_inputs_have_no_attention_and_no_gradient(backend, device):
    tensors, options = case_named("both masks").make(device=device)
    U, A, dq, dk, dv = run(tensors, backend, **options)
    slots, inputs = options["slot_mask"], options["input_mask"]
    assert (A[~slots] == 0).all()
    assert (A.mT[~inputs] == 0).all()
    assert (dq[~slots] == 0).all()
    assert (dk[~inputs] == 0).all()
    assert (dv[~inputs] == 0).all()
    torch.testing.assert_close(A.sum(1)[1], inputs[1].to(A))
    # eps still applies to a masked slot: it takes the plain mean of the inputs.
    mean = tensors[2][1][inputs[1]].mean(0)
    torch.testing.assert_close(U[1][~slots[1]], mean.expand(int((~slots[1]).sum()), -1))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 4), (3, 1), (2, 1, 4), (2, 1, 1), (2, 3, 4)], ids=str)
def test_masks_broadcast(shape, backend, device):
    (q, k, v), _ = Case("broadcast", batch=(2, 3), K=4, N=4).make(device=device)
    mask = torch.rand(shape, device=device) < 0.6
    whole = mask.expand(2, 3, 4).contiguous()
    for name in ("slot_mask", "input_mask"):
        assert_all_close(run((q, k, v), backend, **{name: mask}), run((q, k, v), backend, **{name: whole}))


def test_a_mask_of_ones_changes_nothing(backend, device):
    tensors, _ = Case("ones").make(device=device)
    masks = {
        name: torch.ones(2, n, dtype=torch.bool, device=device) for name, n in (("slot_mask", 4), ("input_mask", 37))
    }
    assert_all_close(run(tensors, backend, **masks), run(tensors, backend))


def test_padding_equals_leaving_out(backend, device):
    (q, k, v), _ = Case("padded").make(device=device)
    mask = (torch.arange(37) < 30).to(device)
    U, A, dq, dk, dv = run((q, k, v), backend, (q, torch.zeros(2, 4, 37).to(q)), input_mask=mask)
    short = run((q, k[:, :30], v[:, :30]), backend, (q, torch.zeros(2, 4, 30).to(q)))
    assert_all_close((U, A[..., :30], dq, dk[:, :30], dv[:, :30]), short)


# --- edges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no inputs", "no input", "no slot, zero eps", "slot mask, zero eps"])
def test_a_slot_without_anything_is_zero_with_zero_gradient(name, backend, device):
    case = case_named(name)
    tensors, options = case.make(device=device)
    U, _, dq, dk, dv = run(tensors, backend, **options)
    lonely = torch.ones(U.shape[:-1], dtype=torch.bool, device=device)
    if name == "slot mask, zero eps":
        lonely = ~options["slot_mask"]
        assert (U[~lonely] != 0).all()
    assert (U[lonely] == 0).all()
    assert (dq[lonely] == 0).all()
    assert all(x.isfinite().all() for x in (U, dq, dk, dv))


def test_a_slot_that_attention_underflows_for_is_zero(backend, device):
    """Without eps, and without a mask: the softmax itself is exactly 0 for the second slot."""
    q = torch.tensor([[[1.0], [-1.0]]], device=device)
    k, v = torch.full((1, 5, 1), 1e3, device=device), torch.randn(1, 5, 3, device=device)
    U, A, *gradients = run((q, k, v), backend, eps=0)
    assert (A[0, 1] == 0).all()
    assert (U[0, 1] == 0).all()
    torch.testing.assert_close(U[0, 0], v[0].mean(0))
    assert all(x.isfinite().all() for x in gradients)


@each_dtype
def test_large_logits_do_not_overflow(dtype, backend, device):
    (q, k, v), _ = Case("large").make(dtype, device)
    got = run((100 * q, 100 * k, v), backend)
    assert all(x.isfinite().all() for x in got[:2])
    assert all(not x.isnan().any() for x in got)
    torch.testing.assert_close(got[1].float().sum(1), torch.ones(2, 37, device=device), atol=1e-2, rtol=0)


def test_default_eps_survives_half_precision(backend, device):
    """1e-8 is 0 in float16. Here it alone decides: no input chooses the second slot, which takes the mean."""
    q = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float16, device=device)
    k = torch.full((1, 5, 1), 1e3, dtype=torch.float16, device=device)
    v = torch.randn(1, 5, 3, device=device).half()
    U = slot_attention(q, k, v, backend=backend)
    torch.testing.assert_close(U[0, 1], v[0].float().mean(0).half())


@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_nan_goes_to_everything_that_depends_on_it(which, backend, device):
    tensors, _ = Case("nan", batch=(2,)).make(device=device)
    clean = run(tensors, backend)
    poisoned = [x.clone() for x in tensors]
    poisoned[which][1, 2, 0] = float("nan")
    U, A, dq, dk, dv = run(poisoned, backend)
    assert U[1].isnan().any(-1).all()  # each slot: through the softmax, or the mean of v
    if which < 2:
        assert A[1].isnan().any(-1).all()
    for gradient in (dq, dk):
        assert gradient[1].isnan().any()
    # The other image knows nothing of it.
    assert_all_close([x[0] for x in (U, A, dq, dk, dv)], [x[0] for x in clean])


def test_bitwise_repeatable(backend, device):
    tensors, options = case_named("both masks").make(torch.float32, device)
    first = run(tensors, backend, **options)
    for x, y in zip(run(tensors, backend, **options), first, strict=True):
        assert torch.equal(x, y)


def test_inputs_are_never_written_to(backend, device):
    for name in ("plain", "both masks", "joint heads, masks"):
        tensors, options = case_named(name).make(device=device)
        inputs = [x.requires_grad_() for x in tensors]
        masks = [x for x in options.values() if isinstance(x, Tensor)]
        before = [x.detach().clone() for x in (*inputs, *masks)]
        U, A = slot_attention(*inputs, return_attention=True, backend=backend, **options)
        incoming = torch.randn_like(U), torch.randn_like(A)
        gradients_before = [x.clone() for x in incoming]
        torch.autograd.backward((U, A), incoming)
        for x, y in zip((*inputs, *masks, *incoming), (*before, *gradients_before), strict=True):
            assert torch.equal(x, y)


def test_nothing_of_size_inputs_by_slots_is_kept_for_backward(backend, device):
    tensors, _ = Case("kept", batch=(2,), K=5, N=37, Dk=3, Dv=2).make(device=device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        slot_attention(*(x.requires_grad_() for x in tensors), backend=backend).sum()
    largest = max(x.numel() for x in kept)
    if backend == "reference":  # plain autograd keeps the attention
        assert largest == 2 * 5 * 37
    else:
        assert largest == 2 * 37 * 3


def test_autocast_leaves_the_arithmetic_alone(backend, device):
    tensors, _ = Case("autocast").make(torch.float32, device)
    expected = run(tensors, backend)

    def attend(q, k, v):
        with torch.autocast(device, dtype=torch.bfloat16):
            return slot_attention(q, k, v, return_attention=True, backend=backend)

    got = results(attend, tensors)
    if backend != "reference":  # plain autograd's own steps obey an autocast around backward
        with torch.autocast(device, dtype=torch.bfloat16):
            assert all(map(torch.equal, run(tensors, backend), expected))
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)


def test_function_is_what_the_public_call_runs(any_device):
    """`SlotAttentionFunction` by itself, with the reference's kernels."""
    tensors, _ = Case("function").make(device=any_device)
    options = Options(scale=0.25, eps=1e-8, eps_in="weights", normalize="mean", joint_heads=False)

    def function(q, k, v):
        U, _, A = SlotAttentionFunction.apply(q, k, v, None, None, None, options, True, "reference")
        return U, A

    got = results(function, tensors)
    assert_all_close(got, run(tensors, "reference"))


# --- torch.compile ------------------------------------------------------------------------------------------


def _compiled_sum(compiled, q, k, v, masks):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    U, A = compiled(*leaves, *masks)
    return U, A, *torch.autograd.grad((U * U).sum() + (A * A).sum(), leaves)


@compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_compiles_as_one_graph(dynamic, masked, backend, device):
    def function(q, k, v, slot_mask=None, input_mask=None):
        return slot_attention(
            q, k, v, slot_mask=slot_mask, input_mask=input_mask, return_attention=True, backend=backend
        )

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch, N in ((2, 37), (3, 50)) if dynamic else ((2, 37),):
        case = Case("compiled", (batch,), N=N, slots="some" if masked else "all", inputs="some" if masked else "all")
        tensors, masks = case.make(device=device)
        got = _compiled_sum(compiled, *tensors, masks.values())
        assert_all_close(got, _compiled_sum(function, *tensors, masks.values()))


@compiles
def test_compiles_with_one_tensor_for_keys_and_values(backend, device):
    (q, k, _), _ = Case("compiled").make(device=device)
    torch.compiler.reset()
    k.requires_grad_()
    compiled = torch.compile(lambda q, k: slot_attention(q, k, k, backend=backend), backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(q, k).square().sum(), k)
    (expected,) = torch.autograd.grad(slot_attention(q, k, k, backend=backend).square().sum(), k)
    torch.testing.assert_close(got, expected)


@compiles
def test_compiles_with_an_option_that_changes(backend, device):
    (q, k, v), _ = Case("compiled").make(device=device)
    torch.compiler.reset()

    def function(scale):
        return slot_attention(q, k, v, scale=scale, backend=backend)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for scale in (0.5, 0.6, 0.7):
        torch.testing.assert_close(compiled(scale), function(scale))


# --- any shape ----------------------------------------------------------------------------------------------


@settings(max_examples=examples(40), deadline=None, derandomize=True)
@given(
    batch=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    K=st.integers(1, 12),
    N=st.integers(0, 20),
    Dk=st.integers(1, 9),
    Dv=st.integers(0, 9),
    eps=st.sampled_from([0.0, 1e-8, 0.5]),
    eps_in=st.sampled_from(["weights", "denominator"]),
    normalize=st.sampled_from(["mean", "sum"]),
    slots=st.sampled_from(["all", "some", "shared", "none"]),
    inputs=st.sampled_from(["all", "some", "shared", "none"]),
    joint_heads=st.booleans(),
)
def check_any_shape(backend, device, batch, K, N, Dk, Dv, eps, eps_in, normalize, slots, inputs, joint_heads):
    options = {
        "eps": eps,
        "eps_in": eps_in,
        "normalize": normalize,
        "joint_heads": joint_heads and len(batch) > 0 and batch[-1] > 0,
    }
    tensors, options = Case("any", batch, K, N, Dk, Dv, options, slots, inputs).make(device=device)
    assert_all_close(run(tensors, backend, **options), results(literal.slot_attention, tensors, **options))


def test_any_shape(backend, device):
    check_any_shape(backend, device)


# --- what it is measured on ---------------------------------------------------------------------------------


def test_bytes_and_flops_of_tetrominoes():
    case = BENCHMARKS["cpu"][0]
    # 64 images: 4 queries, 1225 keys and 1225 values of 64 numbers in, 4 updates out.
    assert case.bytes_moved(torch.float32) == 64 * 4 * 64 * (4 + 1225 + 1225 + 4)
    assert case.bytes_moved(torch.bfloat16, backward=True) == 64 * 2 * 64 * (2 * (4 + 1225 + 1225) + 4)
    assert case.flops() == 2 * 64 * 1225 * 4 * (64 + 64)
    assert case.flops(backward=True) == 2 * 64 * 1225 * 4 * 5 * 64
