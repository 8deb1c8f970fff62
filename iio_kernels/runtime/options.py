"""The options that are one of some words, as type checkers know them."""

from __future__ import annotations

from typing import Literal

Present = Literal["cpu", "triton", "cuda", "reference"]
#: Of every operation but those of inpainting, which have one more.
Backend = Literal["auto", "cpu", "triton", "reference"]
InpaintingBackend = Literal["auto", "cpu", "triton", "cuda", "reference"]

EpsIn = Literal["weights", "denominator"]
Normalize = Literal["mean", "sum"]
Reduction = Literal["mean", "sum", "none"]
Terms = Literal["sum", "mean"]

# Of `nn.SlotAttention`.
Softmax = Literal["slots", "inputs"]
Update = Literal["gru", "residual", "replace"]
Initial = Literal["gaussian", "gaussians", "queries", "given"]
Gradient = Literal["unrolled", "implicit", "bilevel"]
Attention = Literal["softmax", "weights"]
AttentionLayout = Literal["KN", "NK"]
AttentionHeads = Literal["sum", "mean", "separate"]
