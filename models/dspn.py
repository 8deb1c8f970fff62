"""DSPN (Zhang et al. 2019, "Deep Set Prediction Networks"): objects by descent on the representation of their set.

A permutation-invariant encoder g maps sets to vectors, an image encoder maps an image to the vector z that its set of
objects Y should have. A set is read out of z by T steps of gradient descent, through which training differentiates:

    Y^(t+1) = Y^(t) - eta dL(Y^(t)) / dY,  L(Y) = mean of Huber's loss of g(Y) - z,  from a learnt Y^(0)  (algorithm 1)

Training minimises the set loss of Y^(T), under Hungarian matching, and 0.1 L(Y) of the true Y, which ties both encoders
together. Layers, constants and initial weights are those of the authors' program for state prediction on CLEVR
(Cyanogenoid/dspn), on which the paper's text is brief. Objects are rows (M, 19) as in `models.set_prediction`, of which
two things differ from that program's: coordinates lie in [0, 1], there in [-1, 1], and properties stand in another
order. The last number, "real", is the paper's mask feature.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.properties import NUM_PROPERTIES
from models.recipe import SMOKE, Recipe
from models.scene import signed
from models.set_prediction import set_loss

#: Of the representation loss of the true set, beside the set loss as a mean over the M pairs.
REPRESENTATION_WEIGHT = 0.1


def representation_loss(encoded: Tensor, z: Tensor) -> Tensor:
    """Huber's loss, mean over features, of encoded sets (B, d) as the wanted vectors (B, d): (B,)."""
    return F.huber_loss(encoded, z, reduction="none").mean(-1)


class FSPool(nn.Module):
    """Featurewise sort pooling (Zhang et al. 2020, "FSPool"): (..., N, C) -> (..., C) for any N >= 1.

    Each feature is sorted over the set, largest first, and summed with weights w_c(r) of the relative rank r in [0, 1]:
    a learnt function, linear on each of `pieces` equal parts. O(N log N C).
    """

    def __init__(self, features: int, pieces: int = 20) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(pieces + 1, features))  # w_c at the ends of the pieces

    def forward(self, x: Tensor) -> Tensor:
        pieces = len(self.weight) - 1
        place = torch.linspace(0, pieces, x.shape[-2], device=x.device, dtype=self.weight.dtype)
        left = place.long().clamp(max=pieces - 1)
        weight = torch.lerp(self.weight[left], self.weight[left + 1], (place - left).unsqueeze(1))  # (N, C)
        return (x.sort(-2, descending=True).values * weight).sum(-2)


class SetEncoder(nn.Module):
    """g: a relation network over all pairs of elements, themselves included, pooled by FSPool: (B, M, P) -> (B, d)."""

    def __init__(self, element_size: int, latent_size: int, hidden_size: int) -> None:
        super().__init__()
        self.pair = nn.Linear(2 * element_size, hidden_size)
        self.relation = nn.Linear(hidden_size, latent_size)
        self.pool = FSPool(latent_size)

    def forward(self, elements: Tensor) -> Tensor:
        # The first layer of a pair is a sum of what it makes of each: M products instead of M^2.
        first, second = self.pair.weight.chunk(2, 1)
        pairs = F.linear(elements, first, self.pair.bias).unsqueeze(-2) + F.linear(elements, second).unsqueeze(-3)
        relations = self.relation(F.relu(pairs)).flatten(-3, -2)
        return self.pool(relations / relations.shape[-2])


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution and its batch normalisation."""
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(conv(inputs, outputs, 3, stride), nn.ReLU(), conv(outputs, outputs, 3))
        self.shortcut = nn.Identity() if (inputs, stride) == (outputs, 1) else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


class ImageEncoder(nn.Sequential):
    """ResNet-34 without its head, and two convolutions more: (B, 3, H, W) -> z (B, d). 128 pixels end as 4, 2 and 1."""

    def __init__(self, resolution: tuple[int, int], latent_size: int, channels: int) -> None:
        super().__init__(conv(3, channels, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        width = channels
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                self.append(BasicBlock(width, channels << stage, stride=2 if stage > 0 and block == 0 else 1))
                width = channels << stage
        left = tuple(-(-pixels // 64) for pixels in resolution)  # after six halvings
        self.extend([conv(width, width, 3, 2), nn.Conv2d(width, latent_size, left), nn.Flatten()])


class DSPN(nn.Module):
    """Image -> K objects.

    Args:
        resolution: (H, W) of the images.
        channels: width of the ResNet's first stage; the others are 2, 4 and 8 times as wide.
        latent_size: d, the width of z and of the set encoder's hidden layer.
        num_slots: K, the rows of Y.
        iterations: T. A trained model takes others, too: the paper trains with 10 and predicts with up to 30.
        inner_rate: eta. The paper's 800 is that of L averaged over a batch of 32, so each image's own is a 32nd of it.
    """

    noise_shape = (0,)
    """The prediction is no draw: there is nothing for noise to decide."""

    adam_only = ("start", "set_encoder.")
    """What Muon should leave to Adam: the start is no map, and a descent takes steps as large as the set encoder's
    weights, which Muon makes large at once."""

    def __init__(
        self,
        resolution: tuple[int, int] = (128, 128),
        *,
        channels: int = 64,
        latent_size: int = 512,
        num_slots: int = 10,
        iterations: int = 10,
        inner_rate: float = 800 / 32,
    ) -> None:
        super().__init__()
        self.iterations, self.inner_rate = iterations, inner_rate
        self.image_encoder = ImageEncoder(resolution, latent_size, channels)
        self.set_encoder = SetEncoder(NUM_PROPERTIES, latent_size, latent_size)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.start = nn.Parameter(torch.rand(num_slots, NUM_PROPERTIES))  # Y^(0)
        nn.init.constant_(self.start[:, -1], 0.5)

    def forward(
        self, image: Tensor, *, noise: Tensor | None = None, stepwise: bool = False, objects: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict the objects of images (B, 3, H, W) in [0, 1]: Y^(T) (B, K, 19), the last number in [0, 1].

        `stepwise` gives those after every step, (T, B, K, 19). With the true `objects` (B, M, 19) it returns the scalar
        L(objects), mean over B, as well. Under autocast the image encoder alone takes the lower precision: the descent
        magnifies rounding. `noise` (B, 0) is taken from whoever trains all models alike.
        """
        z = self.image_encoder(signed(image))
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(self.start.dtype)
            steps = self.descend(z)
            predicted = torch.stack(steps) if stepwise else steps[-1]
            if objects is None:
                return predicted
            # g knows how many rows there are, so the true set gets as many as Y. Rows of zeros come last.
            objects = F.pad(objects, (0, 0, 0, len(self.start) - objects.shape[-2]))
            return predicted, representation_loss(self.set_encoder(objects), z).mean()

    def descend(self, z: Tensor) -> list[Tensor]:
        """Y^(1) to Y^(T) for wanted vectors (B, d), differentiable where gradients are enabled."""
        differentiable = torch.is_grad_enabled()
        steps, Y = [], valid(self.start.expand(len(z), -1, -1))
        for _ in range(self.iterations):
            with torch.enable_grad():  # the descent needs its gradient where training does not, too
                loss = representation_loss(self.set_encoder(Y.requires_grad_()), z).sum()
                (gradient,) = torch.autograd.grad(loss, Y, create_graph=differentiable)
            Y = valid(Y - self.inner_rate * gradient)
            steps.append(Y)
        return steps


def valid(objects: Tensor) -> Tensor:
    """The objects with their last number, how real they are, clamped to [0, 1]."""
    return torch.cat([objects[..., :-1], objects[..., -1:].clamp(0, 1)], -1)


def loss_and_parts(
    made: Tensor | tuple[Tensor, Tensor], objects: Tensor, coordinate_scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The set loss of what the model made of images and their objects, and the representation loss of these."""
    predicted, representation = made
    loss = set_loss(predicted, objects, coordinate_scale)
    parts = {"loss": loss.detach(), "representation": representation.detach()}
    # Weighted beside a mean over the pairs, of which `set_loss` is the sum.
    return loss + REPRESENTATION_WEIGHT * predicted.shape[-2] * representation, parts


def build(resolution: tuple[int, int], *, channels: int, slot_size: int, num_slots: int, iterations: int) -> DSPN:
    """The network that `train.py` trains."""
    return DSPN(resolution, channels=channels, latent_size=slot_size, num_slots=num_slots, iterations=iterations)


PRESETS: dict[str, dict[str, Any]] = {
    # The paper, and the options of the published code.
    "paper": dict(
        epochs=100, num_scenes=70_000, eval_scenes=15_000,
        channels=64, slot_size=512, iterations=10, batch_size=32,
        optimizer="adam", lr=3e-4, warmup_steps=0, half_life=10**9, clip=0.0, initial_weights="own",
    ),
    "quick": dict(
        steps=5000, num_scenes=10_000, eval_scenes=320,
        channels=16, slot_size=128, iterations=5, batch_size=16,
        optimizer="muon", lr=2e-3, warmup_steps=100, half_life=1800, clip=1.0, initial_weights="own",
    ),
    "smoke": SMOKE | dict(num_scenes=64, eval_scenes=16, channels=8, slot_size=16, iterations=2),
}  # fmt: skip

RECIPES = (
    Recipe(
        "dspn", "DSPN", "Zhang et al. 2019", "set-prediction", build, PRESETS,
        fixed_slots=True, set_loss=loss_and_parts, sees_objects=True,
    ),
)  # fmt: skip
