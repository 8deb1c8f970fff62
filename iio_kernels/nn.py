"""The Slot Attention module, in the conventions of those who use it, on the operations of this package."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from typing_extensions import TypeVar

from iio_kernels.ops.slot_attention.api import slot_attention_from_inputs
from iio_kernels.ops.slot_attention_module.api import SlotAttentionWeights, fits_triton, slot_attention_module
from iio_kernels.runtime import checks
from iio_kernels.runtime.autograd import without_autocast
from iio_kernels.runtime.numerics import arithmetic_dtype, cast, divide
from iio_kernels.runtime.options import (
    Attention,
    AttentionHeads,
    AttentionLayout,
    Backend,
    EpsIn,
    Gradient,
    Initial,
    Normalize,
    Softmax,
    Update,
)

__all__ = ["SlotAttention", "convert_weights"]

#: What a call of the module returns, for type checkers: a tensor, or with `attention` two.
Result = TypeVar("Result", covariant=True, default=Any)


class SlotAttention(nn.Module, Generic[Result]):
    """Slot Attention: slots compete for inputs, in several iterations, and each is updated with the mean of its own.

        x = norm_inputs(inputs)
        for each of `iterations`:
            s = norm_slots(slots)
            q, k, v = to_q(s), to_k(x), to_v(x)              split into heads
            A = softmax over slots of scale * q @ k.mT
            W = (A + eps) / sum over inputs of (A + eps)
            updates = combine(W @ v)                         heads side by side
            slots = gru(updates, slots)
            slots = slots + mlp(norm_mlp(slots))

    Keys and values are never made. The defaults are those of Locatello et al. 2020; every option is a convention that
    somebody uses.

    Args:
        input_size: width of the inputs, Dx.
        slot_size: width of the slots, D.
        num_slots: K, unless a call says otherwise.
        iterations: T, unless a call says otherwise.
        kvq_size: width of queries, keys and values, all heads together; None: `slot_size`.
        heads: they divide `kvq_size`.
        joint_heads: one softmax over heads and slots together (SAVi, SLATE, OCLF); otherwise one for each head.
        combine_heads: a linear layer, `combine`, on the updates of all heads (lucidrains' multi-head module).
        bias: whether `to_q`, `to_k` and `to_v` have biases.
        project: False: queries are the slots, keys and values the inputs, as they are (soft k-means); all of one width.
        scale: factor on the logits; None: `(kvq_size / heads) ** -0.5`. Divide it by a softmax temperature to use one.
        eps: small number >= 0 that keeps the mean defined.
        eps_in: "weights" adds eps to every weight, as above; "denominator" once to their sum (SAVi, ISA, BO-QSA).
        normalize: "mean", as above, or "sum", no normalisation: W = A.
        softmax: "slots", as above, or "inputs", as in ordinary attention, where slots do not compete (the ablation of
            Locatello et al.): A = softmax over inputs, W = A. `eps`, `eps_in` and `normalize` play no part then, and
            `to_k` has no bias, which would cancel. PyTorch's own operations compute it, whatever the backend.
        update: "gru", as above; "residual", `slots + updates`; or "replace", `updates`.
        norm_updates: a LayerNorm on the updates before they change the slots, as after a weighted sum (an ablation of
            Locatello et al.).
        normalized_state: the GRU's state, or what is added to, is `s` instead of `slots` (VideoSAUR).
        mlp_size: hidden width of the MLP; None: neither MLP nor `norm_mlp`.
        mlp_last: False: no MLP in the last iteration (STEVE).
        norm_inputs, norm_slots, norm_mlp: False: inputs, slots or what enters the MLP are taken as they are.
        norm_eps: small number > 0 added to the variances of all normalisations.
        initial: where initial slots come from that a call does not give: "gaussian", drawn from one that all slots
            share; "gaussians", from one for each slot; "queries", learnt (BO-QSA); "given", from the call alone. Of the
            middle two there are `num_slots`, of which a call may take the first few.
        gradient: "unrolled", through all iterations; "implicit", through the last alone, to its weights and the inputs
            (Chang et al. 2022, whose T iterations and one step are T + 1 here); "bilevel", the same and straight
            through to the initial slots, as if those were what the last iteration began with (BO-QSA, SPOT). Under
            "implicit" the initial slots learn nothing: DistributedDataParallel takes find_unused_parameters=True.
        neumann_terms: n >= 0, for gradient "implicit": how many further terms it has of the series that is the gradient
            of a fixed point, see below. It takes two iterations or more, and no torch.compile(fullgraph=True).
        attention: None, or what to return of the last iteration beside the slots: "softmax", A, or "weights", W.
        attention_layout: "KN", `(..., K, N)`, or "NK", `(..., N, K)`.
        attention_heads: "sum" or "mean" over heads, or "separate", `(..., heads, K, N)`.
        backend: of the operations, see `slot_attention`.

    Its parameters are those of `norm_inputs`, `norm_slots`, `norm_updates`, `norm_mlp` (LayerNorm), `mu` and
    `log_sigma`, `to_q`, `to_k`, `to_v` and `combine` (Linear), `gru` (GRUCell) and `mlp` (Linear, ReLU, Linear), as far
    as the options have them. Of these layers the parameters alone are used: forward hooks on them are not called.

    Forward takes

    - inputs `(..., N, input_size)`: all leading dimensions are batch (images, frames). Any strides.
    - slots `(..., K, slot_size)`, the initial ones: leading dimensions broadcast to those of inputs. None: see
      `initial`.
    - num_slots, iterations: instead of the module's own. With slots or noise, num_slots must be theirs.
    - noise `(..., K, slot_size)`: standard normal numbers to draw the initial slots by; None: torch's own.
    - slot_mask, bool, broadcasts to `(..., K)`: True = the slot takes part. Others have A = 0, and are
      updated with what that leaves: the mean of all values where eps is in the weights, else 0.
    - input_mask, bool, broadcasts to `(..., N)`: True = the input takes part. Others add nothing, whatever they hold.

    and returns the slots `(..., K, slot_size)`, in the dtype of the initial ones, or with `attention` the pair slots,
    attention, in at least float32 and differentiable. Arithmetic, too, is at least float32 whatever the storage type or
    autocast; autocast changes nothing but what dtype `norm_inputs` returns.

    The implicit gradient. Slots that an iteration f leaves where they are, s = f(s, w), depend on the weights w by
    ds/dw = (I - J)^-1 df/dw with J = df/ds. Of the Neumann series (I - J)^-1 = I + J + J^2 + ... gradient="implicit"
    takes the first term, as the paper does, and `neumann_terms=n` those up to J^n: from the last iteration the gradient
    goes to the one before it, and is multiplied n - 1 times by that one's J before it goes on to weights and inputs.
    What is kept for it is the graph of two iterations, however many there are of iterations or terms. If the iterations
    contract, each term brings the gradient nearer to that of the fixed point, of slots and attention alike; if they do
    not, terms may grow. With them second derivatives raise, and torch.compile leaves one iteration to eager mode.

    All iterations are one operator, `slot_attention_module`, where it has the options: one head, projections of the
    slots' width, no biases, softmax over slots, eps in the weights, a mean that is not normalised, a GRU on the slots,
    an MLP, slots and MLP normalised, and no masks. Otherwise each iteration is `slot_attention_from_inputs` with
    torch's own layers around it. Results are the same to rounding.

    Raises:
        TypeError: an option or an argument has the wrong type.
        ValueError: an option has a value that does not exist, or shapes or devices do not match.
        RuntimeError: the backend asked for by name cannot be used on this machine.

    Complexity: O(B T K N input_size) operations and those of the layers on the slots, see `slot_attention_module`;
    each head takes as many.

    Source: Locatello et al. 2020, "Object-Centric Learning with Slot Attention", algorithm 1; implicit gradient: Chang
    et al. 2022, "Object Representations as Fixed Points"; bilevel: Jia et al. 2023, "Improving Object-centric Learning
    with Query Optimization".

    Example:
        >>> module = iio_kernels.nn.SlotAttention(32, 64, num_slots=4, attention="softmax")
        >>> slots, attention = module(torch.randn(8, 1225, 32))
        >>> slots.shape, attention.shape
        (torch.Size([8, 4, 64]), torch.Size([8, 4, 1225]))
    """

    @overload
    def __init__(
        self: SlotAttention[Tensor], input_size: int, slot_size: int, *, num_slots: int = ..., iterations: int = ...,
        kvq_size: int | None = ..., heads: int = ..., joint_heads: bool = ..., combine_heads: bool = ...,
        bias: bool = ..., project: bool = ..., scale: float | None = ..., eps: float = ..., eps_in: EpsIn = ...,
        normalize: Normalize = ..., softmax: Softmax = ..., update: Update = ..., norm_updates: bool = ...,
        normalized_state: bool = ..., mlp_size: int | None = ..., mlp_last: bool = ..., norm_inputs: bool = ...,
        norm_slots: bool = ..., norm_mlp: bool = ..., norm_eps: float = ..., initial: Initial = ...,
        gradient: Gradient = ..., neumann_terms: int = ..., attention: None = ...,
        attention_layout: AttentionLayout = ..., attention_heads: AttentionHeads = ..., backend: Backend = ...,
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self: SlotAttention[tuple[Tensor, Tensor]], input_size: int, slot_size: int, *, num_slots: int = ...,
        iterations: int = ..., kvq_size: int | None = ..., heads: int = ..., joint_heads: bool = ...,
        combine_heads: bool = ..., bias: bool = ..., project: bool = ..., scale: float | None = ..., eps: float = ...,
        eps_in: EpsIn = ..., normalize: Normalize = ..., softmax: Softmax = ..., update: Update = ...,
        norm_updates: bool = ..., normalized_state: bool = ..., mlp_size: int | None = ..., mlp_last: bool = ...,
        norm_inputs: bool = ..., norm_slots: bool = ..., norm_mlp: bool = ..., norm_eps: float = ...,
        initial: Initial = ..., gradient: Gradient = ..., neumann_terms: int = ..., attention: Attention,
        attention_layout: AttentionLayout = ..., attention_heads: AttentionHeads = ..., backend: Backend = ...,
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self: SlotAttention[Tensor | tuple[Tensor, Tensor]], input_size: int, slot_size: int, *, num_slots: int = ...,
        iterations: int = ..., kvq_size: int | None = ..., heads: int = ..., joint_heads: bool = ...,
        combine_heads: bool = ..., bias: bool = ..., project: bool = ..., scale: float | None = ..., eps: float = ...,
        eps_in: EpsIn = ..., normalize: Normalize = ..., softmax: Softmax = ..., update: Update = ...,
        norm_updates: bool = ..., normalized_state: bool = ..., mlp_size: int | None = ..., mlp_last: bool = ...,
        norm_inputs: bool = ..., norm_slots: bool = ..., norm_mlp: bool = ..., norm_eps: float = ...,
        initial: Initial = ..., gradient: Gradient = ..., neumann_terms: int = ..., attention: Attention | None,
        attention_layout: AttentionLayout = ..., attention_heads: AttentionHeads = ..., backend: Backend = ...,
    ) -> None: ...  # fmt: skip
    def __init__(
        self,
        input_size: int,
        slot_size: int,
        *,
        num_slots: int = 7,
        iterations: int = 3,
        kvq_size: int | None = None,
        heads: int = 1,
        joint_heads: bool = False,
        combine_heads: bool = False,
        bias: bool = False,
        project: bool = True,
        scale: float | None = None,
        eps: float = 1e-8,
        eps_in: EpsIn = "weights",
        normalize: Normalize = "mean",
        softmax: Softmax = "slots",
        update: Update = "gru",
        norm_updates: bool = False,
        normalized_state: bool = False,
        mlp_size: int | None = 128,
        mlp_last: bool = True,
        norm_inputs: bool = True,
        norm_slots: bool = True,
        norm_mlp: bool = True,
        norm_eps: float = 1e-5,
        initial: Initial = "gaussian",
        gradient: Gradient = "unrolled",
        neumann_terms: int = 0,
        attention: Attention | None = None,
        attention_layout: AttentionLayout = "KN",
        attention_heads: AttentionHeads = "sum",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.input_size = checks.integer("input_size", input_size, at_least=1)
        self.slot_size = checks.integer("slot_size", slot_size, at_least=1)
        self.num_slots = checks.integer("num_slots", num_slots, at_least=1)
        self.iterations = checks.integer("iterations", iterations, at_least=1)
        kvq_size = slot_size if kvq_size is None else checks.integer("kvq_size", kvq_size, at_least=1)
        self.heads = checks.integer("heads", heads, at_least=1)
        if mlp_size is not None:
            checks.integer("mlp_size", mlp_size, at_least=1)
        if kvq_size % heads:
            raise ValueError(f"kvq_size: expected a multiple of heads = {heads}, got {kvq_size}")
        for name, value in (
            ("joint_heads", joint_heads), ("combine_heads", combine_heads), ("bias", bias), ("project", project),
            ("norm_updates", norm_updates), ("normalized_state", normalized_state), ("mlp_last", mlp_last),
            ("norm_inputs", norm_inputs), ("norm_slots", norm_slots), ("norm_mlp", norm_mlp),
        ):  # fmt: skip
            checks.flag(name, value)
        checks.option("eps_in", eps_in, ("weights", "denominator"))
        checks.option("normalize", normalize, ("mean", "sum"))
        checks.option("softmax", softmax, ("slots", "inputs"))
        checks.option("update", update, ("gru", "residual", "replace"))
        checks.option("initial", initial, ("gaussian", "gaussians", "queries", "given"))
        checks.option("gradient", gradient, ("unrolled", "implicit", "bilevel"))
        checks.option("attention", attention, (None, "softmax", "weights"))
        checks.option("attention_layout", attention_layout, ("KN", "NK"))
        checks.option("attention_heads", attention_heads, ("sum", "mean", "separate"))
        if joint_heads and softmax == "inputs":
            raise ValueError('joint_heads: expected False where the softmax is over "inputs", got True')
        if checks.integer("neumann_terms", neumann_terms, at_least=0) and gradient != "implicit":
            raise ValueError(f'neumann_terms: expected 0 where gradient is not "implicit", got {neumann_terms}')
        if not project:
            if bias:
                raise ValueError("bias: expected False without projections, got True")
            if not input_size == slot_size == kvq_size:
                raise ValueError(
                    f"project: expected True where widths differ, got False with input_size = {input_size}, "
                    f"slot_size = {slot_size}, kvq_size = {kvq_size}"
                )
        updates_size = slot_size if combine_heads else kvq_size
        if update != "gru" and updates_size != slot_size:
            raise ValueError(f"kvq_size: expected slot_size = {slot_size} without GRU or combine_heads, got {kvq_size}")
        self.scale: float = (kvq_size // heads) ** -0.5 if scale is None else checks.number("scale", scale)
        self.eps = checks.number("eps", eps, at_least=0)
        self.joint_heads, self.eps_in, self.normalize, self.softmax = joint_heads, eps_in, normalize, softmax
        self.update, self.normalized_state, self.mlp_last = update, normalized_state, mlp_last
        self.initial, self.gradient, self.neumann_terms, self.backend = initial, gradient, neumann_terms, backend
        self.attention, self.attention_layout, self.attention_heads = attention, attention_layout, attention_heads

        self.norm_eps = checks.number("norm_eps", norm_eps, above=0)
        self.norm_inputs = nn.LayerNorm(input_size, norm_eps) if norm_inputs else None
        self.norm_slots = nn.LayerNorm(slot_size, norm_eps) if norm_slots else None
        self.norm_updates = nn.LayerNorm(updates_size, norm_eps) if norm_updates else None
        self.norm_mlp = nn.LayerNorm(slot_size, norm_eps) if norm_mlp and mlp_size is not None else None
        if initial != "given":
            drawn = 1 if initial == "gaussian" else num_slots
            self.mu = nn.Parameter(nn.init.xavier_uniform_(torch.empty(drawn, slot_size)))
            if initial != "queries":
                self.log_sigma = nn.Parameter(nn.init.xavier_uniform_(torch.empty(drawn, slot_size)))
        self.to_q: nn.Linear | _Identity
        self.to_k: nn.Linear | _Identity
        self.to_v: nn.Linear | _Identity
        if project:
            self.to_q = nn.Linear(slot_size, kvq_size, bias)
            self.to_k = nn.Linear(input_size, kvq_size, bias and softmax == "slots")
            self.to_v = nn.Linear(input_size, kvq_size, bias)
        else:
            self.to_q = self.to_k = self.to_v = _Identity(slot_size)
        self.combine = nn.Linear(kvq_size, slot_size) if combine_heads else None
        self.gru = nn.GRUCell(updates_size, slot_size) if update == "gru" else None
        self.mlp: nn.Sequential | None = None
        if mlp_size is not None:
            self.mlp = nn.Sequential(nn.Linear(slot_size, mlp_size), nn.ReLU(), nn.Linear(mlp_size, slot_size))

    def forward(
        self,
        inputs: Tensor,
        slots: Tensor | None = None,
        *,
        num_slots: int | None = None,
        iterations: int | None = None,
        noise: Tensor | None = None,
        slot_mask: Tensor | None = None,
        input_mask: Tensor | None = None,
    ) -> Result:
        """See the class."""
        iterations = self.iterations if iterations is None else checks.integer("iterations", iterations, at_least=1)
        self._check_inputs(inputs)
        initial = self._initial(inputs, slots, num_slots, noise)
        batch, K, N = inputs.shape[:-2], initial.shape[-2], inputs.shape[-2]
        if slot_mask is not None:
            slot_mask = checks.mask("slot_mask", slot_mask, (*batch, K), "(..., K)")
        if input_mask is not None:
            input_mask = checks.mask("input_mask", input_mask, (*batch, N), "(..., N)")
        masks = slot_mask, input_mask

        x = inputs
        if self.norm_inputs is not None:
            # What is masked may hold a NaN, whose gradient through the normalisation would be one.
            x = x if input_mask is None else x.masked_fill(~input_mask.unsqueeze(-1), 0)
            x = self.norm_inputs(x)
        with without_autocast(x.device):
            slots, show = initial.to(arithmetic_dtype(x, initial, self.to_q.weight)), self.attention is not None
            if self.gradient != "unrolled":
                kept = 2 if self.neumann_terms else 1
                if iterations < kept:
                    raise ValueError(f"iterations: expected at least 2 with neumann_terms, got {iterations}")
                with torch.no_grad():
                    fixed, _ = self._iterate(x, slots, iterations - kept, False, *masks)
                fixed = fixed.detach()
                if self.neumann_terms:
                    fixed = self._iterate_implicitly(x, fixed, *masks)
                # What is added is 0: the gradient passes it by.
                passing_by = slots - slots.detach() if self.gradient == "bilevel" else 0
                slots, iterations = fixed + passing_by, 1
            if self.mlp_last or self.mlp is None:
                slots, A = self._iterate(x, slots, iterations, show, *masks)
            else:
                slots, _ = self._iterate(x, slots, iterations - 1, False, *masks)
                slots, A = self._step(x, slots, False, show, *masks)
            slots = cast(slots, initial.dtype)
            result: Any = slots if A is None else (slots, self._shown(A, input_mask))
            return result

    if TYPE_CHECKING:  # torch has it that a call takes and returns anything; it is as `forward`

        def __call__(
            self, inputs: Tensor, slots: Tensor | None = None, *, num_slots: int | None = None,
            iterations: int | None = None, noise: Tensor | None = None, slot_mask: Tensor | None = None,
            input_mask: Tensor | None = None,
        ) -> Result: ...  # fmt: skip

    def draw(self, noise: Tensor) -> Tensor:
        """Initial slots from the learnt Gaussian, or Gaussians, by standard normal noise `(..., K, slot_size)`."""
        K = noise.shape[-2]
        mu, log_sigma = (p if self.initial == "gaussian" else p[:K] for p in (self.mu, self.log_sigma))
        return mu + log_sigma.exp() * noise

    def weights(self) -> SlotAttentionWeights:
        """What `slot_attention_module` takes; for the options that it has, see the class."""
        norm_slots, gru, norm_mlp, mlp = self.norm_slots, self.gru, self.norm_mlp, self.mlp
        if norm_slots is None or gru is None or norm_mlp is None or mlp is None:
            raise ValueError("weights: expected a module with norm_slots, gru, norm_mlp and mlp, got one without")
        first, second = _linears(mlp)
        return SlotAttentionWeights(
            *(norm_slots.weight, norm_slots.bias),
            *(self.to_q.weight, self.to_k.weight, self.to_v.weight),
            *(gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh),
            *(norm_mlp.weight, norm_mlp.bias),
            *(first.weight, first.bias, second.weight, second.bias),
        )

    def extra_repr(self) -> str:
        names = ("num_slots", "iterations", "heads", "joint_heads", "eps", "eps_in", "normalize", "softmax",
                 "update", "normalized_state", "mlp_last", "initial", "gradient", "neumann_terms", "attention",
                 "backend")  # fmt: skip
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    # --- initial slots -----------------------------------------------------------------------------------------------

    def _initial(self, inputs: Tensor, slots: Tensor | None, num_slots: int | None, noise: Tensor | None) -> Tensor:
        """The initial slots (..., K, D), as given or drawn."""
        batch = tuple(inputs.shape[:-2])
        for name, value in (("slots", slots), ("noise", noise)):
            if value is None:
                continue
            checks.tensor(name, value, "(..., K, slot_size)", min_dims=2)
            K = value.shape[-2]
            checks.broadcasts(name, value, batch, (K, self.slot_size), f"slot_size and inputs {tuple(inputs.shape)}")
            checks.same_device(inputs=inputs, **{name: value})
            if num_slots is not None and num_slots != K:
                raise ValueError(f"num_slots: expected the {K} of {name} {tuple(value.shape)}, got {num_slots}")
            num_slots = K
        if slots is not None:
            if noise is not None:
                raise ValueError("noise: expected None where slots are given, got a tensor")
            return slots.expand(*batch, -1, -1)
        if self.initial == "given":
            raise ValueError('slots: expected a tensor, as initial is "given", got None')
        K = self.num_slots if num_slots is None else checks.integer("num_slots", num_slots, at_least=1)
        if self.initial != "gaussian" and len(self.mu) < K:
            raise ValueError(f"num_slots: expected at most the {len(self.mu)} that are learnt, got {K}")
        if self.initial == "queries":
            if noise is not None:
                raise ValueError('noise: expected None, as initial is "queries", got a tensor')
            return self.mu[:K].expand(*batch, -1, -1)
        if noise is None:
            noise = torch.randn(*batch, K, self.slot_size, dtype=self.mu.dtype, device=self.mu.device)
        return self.draw(noise.expand(*batch, -1, -1))

    # --- iterations --------------------------------------------------------------------------------------------------

    def _iterate(
        self, x: Tensor, slots: Tensor, iterations: int, show: bool, slot_mask: Tensor | None, input_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The slots after some whole iterations and, if it is to be shown, the last A (..., heads, K, N)."""
        if iterations > 0 and slot_mask is None and input_mask is None and self._in_one_operator():
            batch, images = x.shape[:-2], math.prod(x.shape[:-2])
            flat_x, flat_slots = x.reshape(images, *x.shape[-2:]), slots.reshape(images, *slots.shape[-2:])
            weights = self.weights()
            if self.backend != "triton" or fits_triton(flat_x, flat_slots, weights):
                out = slot_attention_module(
                    flat_x, flat_slots, weights, iterations, eps=self.eps, norm_eps=self.norm_eps, scale=self.scale,
                    return_attention=show, backend=self.backend,
                )  # fmt: skip
                if isinstance(out, Tensor):
                    return out.reshape(slots.shape), None
                flat_slots, shown = out
                return flat_slots.reshape(slots.shape), shown.reshape(*batch, 1, *shown.shape[-2:])
        A: Tensor | None = None
        for t in range(1, iterations + 1):
            slots, A = self._step(x, slots, self.mlp is not None, show and t == iterations, slot_mask, input_mask)
        return slots, A

    @_disable_dynamo  # as `torch.compiler.disable`, which would import torch.compile with this file
    def _iterate_implicitly(
        self, x: Tensor, slots: Tensor, slot_mask: Tensor | None, input_mask: Tensor | None
    ) -> Tensor:
        """One iteration from a fixed point, whose gradient is that of `neumann_terms` iterations there.

        With J its Jacobian, v (J + ... + J^n) comes of n terms: the hook makes v (I + ... + J^(n-1)) of v, what is left
        goes by the iteration's own graph, to weights and inputs, too.
        """
        if not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))):
            return self._iterate(x, slots, 1, False, slot_mask, input_mask)[0]
        before = slots.requires_grad_()
        after, _ = self._iterate(x, before, 1, False, slot_mask, input_mask)

        def add_terms(v: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError("neumann_terms: the implicit gradient differentiates once, and create_graph is True")
            total = term = v
            for _ in range(self.neumann_terms - 1):
                (term,) = torch.autograd.grad(after, before, term, retain_graph=True)
                total = total + term
            return total

        # The hook is on a view: on `after` itself it would be called by what it calls.
        out = after.view_as(after)
        out.register_hook(add_terms)
        return out

    def _in_one_operator(self) -> bool:
        """Whether `slot_attention_module` has all options of the iterations."""
        return (
            self.heads == 1 and self.to_q.out_features == self.slot_size and self.to_q.bias is None
            and self.combine is None and self.eps_in == "weights" and self.normalize == "mean"
            and self.softmax == "slots" and self.update == "gru" and not self.normalized_state
            and self.norm_slots is not None and self.norm_mlp is not None and self.norm_updates is None
            and isinstance(self.to_q, nn.Linear)
        )  # fmt: skip

    def _step(
        self, x: Tensor, slots: Tensor, mlp: bool, show: bool, slot_mask: Tensor | None, input_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The slots after one iteration, with or without its MLP, and A (..., heads, K, N) if it is to be shown."""
        s = _norm(self.norm_slots, slots)
        q = _linear(self.to_q, s).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        attend = self._competing if self.softmax == "slots" else self._over_inputs
        updates, A = attend(x, q, show, slot_mask, input_mask)
        updates = updates.transpose(-3, -2).flatten(-2).to(slots.dtype)
        if self.combine is not None:
            updates = _linear(self.combine, updates)
        updates = _norm(self.norm_updates, updates)

        state = s if self.normalized_state else slots
        if self.gru is not None:
            parameters = self.gru.weight_ih, self.gru.weight_hh, self.gru.bias_ih, self.gru.bias_hh
            gates = [parameter.to(slots.dtype) for parameter in parameters]
            slots = torch.gru_cell(updates.flatten(0, -2), state.flatten(0, -2), *gates).view(slots.shape)
        else:
            slots = state + updates if self.update == "residual" else updates
        if mlp and self.mlp is not None:
            first, second = _linears(self.mlp)
            slots = slots + _linear(second, _linear(first, _norm(self.norm_mlp, slots)).relu())
        return slots, A

    def _competing(
        self, x: Tensor, q: Tensor, show: bool, slot_mask: Tensor | None, input_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The updates (..., heads, K, D / heads), and A (..., heads, K, N) if it is to be shown."""
        (wk, bk), (wv, bv) = (_of_heads(layer, self.heads) for layer in (self.to_k, self.to_v))
        out = slot_attention_from_inputs(
            x.unsqueeze(-3), q, wk, bk, wv, bv, scale=self.scale, eps=self.eps, eps_in=self.eps_in,
            normalize=self.normalize, joint_heads=self.joint_heads,
            slot_mask=None if slot_mask is None else slot_mask.unsqueeze(-2),
            input_mask=None if input_mask is None else input_mask.unsqueeze(-2),
            return_attention=show, backend=self.backend,
        )  # fmt: skip
        return (out, None) if isinstance(out, Tensor) else out

    def _over_inputs(
        self, x: Tensor, q: Tensor, show: bool, slot_mask: Tensor | None, input_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same where each slot's attention sums to 1 over the inputs: keys and values are not made here, either."""
        (wk, _), (wv, bv) = (_of_heads(layer, self.heads) for layer in (self.to_k, self.to_v))
        x = x.to(q.dtype).unsqueeze(-3)
        if input_mask is None:
            A = (self.scale * q @ wk.to(q.dtype) @ x.mT).softmax(-1)
        else:
            out = ~input_mask[..., None, None, :]
            x = x.masked_fill(out.mT, 0)
            logits = self.scale * q @ wk.to(q.dtype) @ x.mT
            A = logits.masked_fill(out, torch.finfo(q.dtype).min).softmax(-1).masked_fill(out, 0)
        if slot_mask is not None:
            A = A.masked_fill(~slot_mask[..., None, :, None], 0)
        updates = (A @ x) @ wv.to(q.dtype).mT
        if bv is not None:
            updates = updates + A.sum(-1, keepdim=True) * bv.to(q.dtype).unsqueeze(-2)
        return updates, A if show else None

    # --- attention ---------------------------------------------------------------------------------------------------

    def _shown(self, A: Tensor, input_mask: Tensor | None) -> Tensor:
        """The attention as the options ask for it, of A (..., heads, K, N)."""
        A = cast(A, arithmetic_dtype(A))
        if self.attention == "weights" and self.normalize == "mean" and self.softmax == "slots":
            W = A + self.eps if self.eps_in == "weights" else A
            if input_mask is not None:
                W = W.masked_fill(~input_mask[..., None, None, :], 0)
            S = W.sum(-1, keepdim=True)
            A = divide(W, S if self.eps_in == "weights" else S + self.eps)
        if self.attention_heads != "separate":
            over_heads = torch.sum if self.attention_heads == "sum" else torch.mean
            A = A.squeeze(-3) if self.heads == 1 else over_heads(A, -3)
        return A if self.attention_layout == "KN" else A.mT

    def _check_inputs(self, inputs: Tensor) -> None:
        checks.tensor("inputs", inputs, "(..., N, input_size)", min_dims=2)
        if inputs.shape[-1] != self.input_size:
            raise ValueError(f"inputs: expected shape (..., N, {self.input_size}), got {tuple(inputs.shape)}")
        checks.same_device(parameters=self.to_q.weight, inputs=inputs)


# The layers, on slots in the dtype of the arithmetic.


class _Identity(nn.Module):
    """In the place of projections where there are none: a linear layer that changes nothing and learns nothing."""

    weight: Tensor
    bias: Tensor | None = None

    def __init__(self, size: int) -> None:
        super().__init__()
        self.out_features = size
        self.register_buffer("weight", torch.eye(size), persistent=False)


def _linear(layer: nn.Linear | _Identity, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def _norm(layer: nn.LayerNorm | None, x: Tensor) -> Tensor:
    if layer is None:
        return x
    return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


def _linears(mlp: nn.Sequential) -> tuple[nn.Linear, nn.Linear]:
    """The MLP's two."""
    layers: Any = mlp  # for type checkers: a Sequential takes them for any modules
    return layers[0], layers[2]


def _of_heads(layer: nn.Linear | _Identity, heads: int) -> tuple[Tensor, Tensor | None]:
    """A projection's weight (heads, width of one, width of x) and bias (heads, width of one)."""
    bias = None if layer.bias is None else layer.bias.unflatten(0, (heads, -1))
    return layer.weight.unflatten(0, (heads, -1)), bias


# --- weights of others -----------------------------------------------------------------------------------------------


def convert_weights(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one Slot Attention module under the names and in the shapes of another's.

        ours.load_state_dict(convert_weights(theirs.state_dict(), ours.state_dict()))
        theirs.load_state_dict(convert_weights(ours.state_dict(), theirs.state_dict()))

    Either may be a `SlotAttention` or one of the field: what a parameter is for is told by its name and its number of
    dimensions. Names that are known, after any prefix:

    - queries, keys, values: `q`, `query` or `queries` and so on (`to_q`, `dense_v`, `to_keys`), perhaps before `_proj`;
    - the normalisation of inputs: what ends in `in`, `input`, `inputs`, `feature`, `features` or `kv`; of slots: in
      `slot`, `slots` or `q`, or the first of `project_q`; before the MLP: in `mlp`, `ff`, `ffn`, `norm2`, `res` or
      `output`, or the normalisation in the MLP (`mlp.0`, `mlp.layers.0`, `mlp.norm`);
    - the MLP's layers: the two in `mlp`, `ffn` or `ff_mlp` (`mlp.2`, `mlp.layers.3`, `mlp.layer1`), or `fc1` and `fc2`;
      that of all heads: `combine...`;
    - the GRU: any `weight_ih`, `weight_hh`, `bias_ih`, `bias_hh`;
    - initial slots: those that end in `mu`, `loc` and `log_sigma`, `log_std`, `log_scale`, `logvar`, `sigma`; learnt
      queries: `slots`, `slots_init`, `initial_slots`, `slots_embedding`, `init_latents`.

    Args:
        weights: a module's `state_dict()`, or anything else by its parameters' names, such as their gradients. Of a
            larger model pass the module's own part.
        like: the other's `state_dict()`. Of its tensors the shapes alone are used.

    Returns:
        like's names, in its order, each with a tensor of `weights`, reshaped: the same values, to the bit, in the same
        dtype, on the same device. There are two exceptions. The spread of initial slots is a logarithm of the
        deviation, or in `logvar` of its square, or in what ends in `sigma` without `log` the deviation itself: each is
        computed from the others, to rounding. A bias that one MLP has and the other has not is 0.

    Raises:
        ValueError: a name is not known, or two are of the same layer; one of the two has a parameter that the other
            has not; or they differ in size.
    """
    given, wanted = _roles(weights, "weights"), _roles(like, "like")
    values = {role: weights[name] for role, name in given.items()}
    for role in _SPREADS.keys() & values.keys() - wanted.keys():
        for other in _SPREADS.keys() & wanted.keys() - values.keys():
            values[other] = _SPREADS[other][1](_SPREADS[role][0](values.pop(role)))
    for layer in ("mlp.0", "mlp.2"):
        bias, weight = f"{layer}.bias", values.get(f"{layer}.weight")
        if bias in wanted and bias not in values and weight is not None:
            values[bias] = weight.new_zeros(len(weight))
        elif bias in values and bias not in wanted and not values[bias].any():
            del values[bias]
    missing, left = sorted(wanted.keys() - values.keys()), sorted(values.keys() - wanted.keys())
    if missing or left:
        parts = [f"nothing for {', '.join(wanted[role] for role in missing)}"] if missing else []
        parts += [f"{', '.join(given.get(role, role) for role in left)} beyond it"] if left else []
        raise ValueError(f"weights: expected what like has, got {' and '.join(parts)}")
    for role, name in wanted.items():
        x, shape = values[role], like[name].shape
        # Initial slots may have leading dimensions of 1; everything else has its shape.
        if [n for n in x.shape if n != 1] != [n for n in shape if n != 1]:
            raise ValueError(
                f"weights: expected shape {tuple(shape)} for {name}, got {tuple(x.shape)} in {given.get(role, role)}"
            )
    return {name: values[role].reshape(like[name].shape) for role, name in wanted.items()}


#: The end of a layer's name, by what it is: a normalisation has one dimension of weights, a linear layer two.
_NORMS = {
    "norm_mlp": r"(mlp|ffn?|norm2|[._]res|[._]output)((\.[a-z]+)?\.(0|norm))?",
    "norm_inputs": r"([._]in|inputs?|features?|kv)",
    "norm_slots": r"(slots?|q)(\.0)?",
    "norm_updates": r"norm_updates",
}
_LINEARS = {
    "to_q": r"(^|[._])(q|query|queries)(_proj)?(\.1)?",
    "to_k": r"(^|[._])(k|keys?)(_proj)?(\.1)?",
    "to_v": r"(^|[._])(v|values?)(_proj)?(\.1)?",
    "combine": r"combine(_heads)?",
    "mlp": r"((mlp|ffn?)(\.[a-z]+)?\.(layer)?|fc)\d",
}
_INITIAL = {
    "log_sigma": r"log_?(sigma|std|scale)",
    "log_var": r"log_?var",
    "sigma": r"sigma",
    "mu": r"(^|[._])(mu|loc)|(^|\.)slots|slots?_(init|embedding)(\.weight)?|initial_slots|init_latents",
}

#: What the spread of initial slots is kept as, by role: how its logarithm is made of it, and it of the logarithm.
_SPREADS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "log_sigma": (lambda x: x, lambda x: x),
    "log_var": (lambda x: x / 2, lambda x: x * 2),
    "sigma": (torch.log, torch.exp),
}


def _roles(weights: Mapping[str, Tensor], argument: str) -> dict[str, str]:
    """The names of weights by what they are for: the parameters of `SlotAttention`, "sigma" and "log_var"."""
    role: str | None
    roles: dict[str, str] = {}
    mlp: list[str] = []  # its linear layers, in the order in which they are applied
    for name, x in weights.items():
        layer, _, parameter = name.rpartition(".")
        if parameter in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            role = f"gru.{parameter}"
        elif (role := _ending(name, _INITIAL)) is None:
            kind = _NORMS if f"{layer}.weight" in weights and weights[f"{layer}.weight"].dim() == 1 else _LINEARS
            role = _ending(layer, kind) if parameter in ("weight", "bias") else None
            if role == "mlp":
                mlp = sorted({*mlp, layer})
                role = f"{layer}.{parameter}"
            elif role is not None:
                role = f"{role}.{parameter}"
        if role is None:
            raise ValueError(
                f"{argument}: expected the parameters of a Slot Attention module, got {name} {tuple(x.shape)}"
            )
        if role in roles:
            raise ValueError(f"{argument}: expected one parameter for {role}, got {roles[role]} and {name}")
        roles[role] = name
    if len(mlp) not in (0, 2):
        raise ValueError(f"{argument}: expected two layers of an MLP, got {', '.join(mlp)}")
    ours = {
        f"{layer}.{p}": f"mlp.{place}.{p}"
        for layer, place in zip(mlp, (0, 2), strict=False)
        for p in ("weight", "bias")
    }
    return {ours.get(role, role): name for role, name in roles.items()}


def _ending(name: str, patterns: dict[str, str]) -> str | None:
    return next((role for role, pattern in patterns.items() if re.search(f"(?:{pattern})$", name)), None)
