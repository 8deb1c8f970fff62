"""The optimizer of slot models: Adam or RMSProp, or Muon for the hidden matrices and Adam for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with steps of the size of Adam's (Liu et al. 2025, "Muon is Scalable ...").

    It replaces a matrix's averaged gradient by roughly the nearest semi-orthogonal one, so that directions in which the
    gradient is small are learnt as fast as others. A convolution's weight is the matrix (out, in * k * k).

    torch.optim.Muon does the same, one matrix after the other in bfloat16. Here matrices of one shape go together and
    in float32: on two CPU cores 3.7 ms instead of 9.7 for the 16 matrices of the quick preset; and the rate may be a
    tensor, as a captured step needs.

    Args:
        parameters: of two or more dimensions.
        lr: the learning rate, a number or a scalar tensor on the parameters' device.
        momentum: of the averaged gradient, which is Nesterov's.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float | Tensor, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            for p in parameters:
                if "average" not in self.state[p]:
                    self.state[p]["average"] = torch.zeros_like(p)
            averages = [self.state[p]["average"] for p in parameters]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, averages, group["momentum"])

            alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            for p, update in zip(parameters, updates, strict=True):
                wide = upright(update.flatten(1))
                alike.setdefault(tuple(wide.shape), []).append((p, wide))
            for (_, width), members in alike.items():
                steps = semi_orthogonal(torch.stack([matrix for _, matrix in members]))
                steps *= -0.2 * width**0.5 * group["lr"]
                for (p, _), step in zip(members, steps.unbind(), strict=True):
                    p += (step if len(p) == len(step) else step.mT).reshape(p.shape)


def upright(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose, with no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def semi_orthogonal(X: Tensor) -> Tensor:
    """Matrices (n, rows, columns), rows <= columns, with the same singular vectors and singular values near 1.

    Five rounds of Newton and Schulz's iteration with Jordan's coefficients, which bring all singular values into
    [0.7, 1.2] instead of close to 1, but small ones in fewer rounds.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        G = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(G, G, G, beta=b, alpha=c), X, beta=a)
    return X


class Optimizer:
    """Adam or RMSProp, or Muon for the hidden matrices and Adam for the rest, at one learning rate.

    Muon leaves to Adam what a model names in `adam_only`, by the beginnings of its parameters' names.

    Args:
        model: whose parameters are trained.
        kind: "adam"; "rmsprop", with the decay of TensorFlow, 0.9, and the root of its epsilon, 1e-5; or "muon".
        capturable: keep the rate and the count of steps on the device, where a captured step reads them.
    """

    def __init__(self, model: nn.Module, kind: Literal["adam", "rmsprop", "muon"], capturable: bool = False) -> None:
        adam_only = getattr(model, "adam_only", ())
        matrices = [
            p
            for name, p in model.named_parameters()
            if kind == "muon" and is_hidden_matrix(p) and not name.startswith(adam_only)
        ]
        rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
        rate = torch.zeros((), device=rest[0].device) if capturable else 0.0
        self.parts: dict[str, torch.optim.Optimizer] = {}
        if kind == "rmsprop":
            self.parts["rmsprop"] = torch.optim.RMSprop(rest, rate, alpha=0.9, eps=1e-5, capturable=capturable)
        else:
            adam = torch.optim.Adam(rest, rate, betas=(0.9, 0.999), eps=1e-8, fused=True, capturable=capturable)
            self.parts["adam"] = adam
        if matrices:
            self.parts["muon"] = Muon(matrices, rate)

    def set_rate(self, rate: float) -> None:
        for part in self.parts.values():
            for group in part.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def tensors(self) -> Iterator[Tensor]:
        """All that the optimizer remembers from step to step."""
        for part in self.parts.values():
            for state in part.state.values():
                yield from state.values()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            rates = [group["lr"] for group in part.param_groups]
            part.load_state_dict(state[name])
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate  # this device's; the saved one may lie on another process's


def is_hidden_matrix(parameter: Tensor) -> bool:
    """More than 4 rows and columns: no vector, nor a map from the 4 coordinates, nor that to RGB and alpha."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) > 4
