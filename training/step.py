"""A step of training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.optimizer import Optimizer
from training.building import recipe_of
from training.config import Config
from training.losses import apply_model, losses
from training.processes import num_ranks


class Batch(NamedTuple):
    """What a step learns from."""

    pixels: Tensor
    """uint8 (B, 3, H, W)."""
    noise: Tensor
    """(B, ...), standard normal: what the model draws."""
    objects: Tensor | None
    """(B, M, 19), the properties to predict; None for discovery."""


class Step:
    """A step of one phase: forward, backward, clip, optimizer. All it learns stays on the device; nothing waits for it.

    On a GPU, with one process, the first call captures the step in a CUDA graph and all calls replay it: some hundred
    launches then cost the host as much as one. Several processes meet in the middle of the backward pass: these launch
    each kernel.

    Attributes:
        values: of the last step, scalars: the parts of the loss, and "gradient_norm" before clipping.
        bad: the first step whose loss or gradient was no number, -1 while there is none.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, phase: str, config: Config, number: int = 0) -> None:
        self.model, self.optimizer, self.phase, self.config = model, optimizer, phase, config
        self.number = torch.tensor(number, device=config.device)
        self.bad = torch.tensor(-1, device=config.device)
        self.values: dict[str, Tensor] = {}
        on_gpu = self.number.is_cuda
        # The host matches predictions to objects: no graph holds that. Nor one, yet, the gradients within a gradient
        # that further terms of Neumann's series are.
        captured = config.task == "discovery" and not config.neumann_terms
        self.captures = on_gpu and config.cuda_graph and num_ranks() == 1 and captured
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch, rate: float) -> None:
        """Step with a batch and a learning rate."""
        self.optimizer.set_rate(rate)
        if not self.captures:
            self.values = self.compute(batch)
            return
        if self.graph is None:
            self.capture(batch)
        self.batch.pixels.copy_(batch.pixels)
        self.batch.noise.copy_(batch.noise)
        self.graph.replay()

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        options: dict[str, Any] = {"stepwise": True} if self.config.stepwise_loss else {}
        if recipe_of(self.config).sees_objects:
            options["objects"] = batch.objects
        made, image = apply_model(self.model, batch.pixels, batch.noise, self.config, **options)
        loss, values = losses(made, image, self.phase, self.config, batch.objects)
        self.model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        self.optimizer.step()
        wrong = (self.bad < 0) & ~(loss.detach() + norm).isfinite()
        self.bad.copy_(torch.where(wrong, self.number, self.bad))
        self.number += 1
        return values | {"gradient_norm": norm}

    def capture(self, batch: Batch) -> None:
        """Capture `compute`. A trial before it compiles kernels and makes the optimizer's state; then it is undone."""

        def tensors() -> Iterator[Tensor]:
            yield from (self.number, self.bad, *self.model.parameters(), *self.optimizer.tensors())

        self.batch = Batch(batch.pixels.clone(), batch.noise.clone(), None)
        before = {id(x): x.detach().clone() for x in tensors()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.compute(self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for x in tensors():
                x.copy_(before[id(x)]) if id(x) in before else x.zero_()
        self.model.zero_grad()  # so that the graph's own memory will hold the gradients
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.values = self.compute(self.batch)
