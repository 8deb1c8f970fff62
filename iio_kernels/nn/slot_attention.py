"""The Slot Attention module, in the conventions of those who use it, on the operations of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from iio_kernels.nn.initial import InitialSlots
from iio_kernels.nn.iterations import Iterations
from iio_kernels.nn.layers import Identity
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

#: What a call of the module returns, for type checkers: a tensor, or with `attention` two.
Result = TypeVar("Result", covariant=True, default=Any)


class SlotAttention(InitialSlots, Iterations, Generic[Result]):
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
        if project:
            self.to_q = nn.Linear(slot_size, kvq_size, bias)
            self.to_k = nn.Linear(input_size, kvq_size, bias and softmax == "slots")
            self.to_v = nn.Linear(input_size, kvq_size, bias)
        else:
            self.to_q = self.to_k = self.to_v = Identity(slot_size)
        self.combine = nn.Linear(kvq_size, slot_size) if combine_heads else None
        self.gru = nn.GRUCell(updates_size, slot_size) if update == "gru" else None
        self.mlp = None
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

    def extra_repr(self) -> str:
        names = ("num_slots", "iterations", "heads", "joint_heads", "eps", "eps_in", "normalize", "softmax",
                 "update", "normalized_state", "mlp_last", "initial", "gradient", "neumann_terms", "attention",
                 "backend")  # fmt: skip
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

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
