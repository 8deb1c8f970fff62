"""The weights of one Slot Attention module under the names of another's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


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
