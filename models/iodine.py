"""IODINE (Greff et al. 2019, "Multi-Object Representation Learning with Iterative Variational Inference").

A spatial Gaussian mixture of K slots explains an image x: slot k's latent z_k, drawn from a posterior N(m_k, v_k) with
parameters lambda_k, is decoded to a picture mu_k and the logit of a mask, and

    log p(x | z) = sum over pixels of log sum_k masks_k N(x; mu_k, sigma^2)

A refinement network improves lambda from what went wrong with the last: the inputs of the paper's appendix, of which
the gradients of L are the most telling. Training minimises L of every posterior, the later the more:

    L_t  = KL(N(m_t, v_t) || N(0, 1)) - log p(x | z_t),   z_t = m_t + sqrt(v_t) noise_t
    loss = sum_t (t / T) L_t

The printed text (appendix C, algorithm 1) and the authors' program (google-deepmind/deepmind-research, iodine) are two
networks and two recipes. `IODINE.configurations` has those of the text, `IODINE.program` those of the program:

- Losses. Text: T, t = 1..T, the first of the learnt initial posterior, so T - 1 refinements count. Program: T + 1,
  t = 0..T, the first with weight 0, so T refinements count.
- Convolutions of the refinement network. Text: stride 1 on Tetrominoes and Multi-dSprites, 2 on CLEVR. Program: 2.
- MLP of the refinement network on CLEVR. Text: 256. Program: 256, 256.
- Recipe. Text: Adam at 3e-4 throughout, batches of 32. Program: falling to a tenth in a million steps, Adam's first
  beta 0.95; Tetrominoes 3e-4 with batches of 256, Multi-dSprites 3e-4 with 128, CLEVR 1e-3 with 32.

Of both: a million steps, gradients clipped to a norm of 5, T = 5. Where they differ otherwise, the text stands here:
normal pixels of sigma 0.1 (program: logistic ones of scale 0.03), coordinates from -1 to 1 (the program gives the
refinement network cosines, but on CLEVR), and ELU after every layer of its MLP (program: none after the last). Where
the text is silent the program decides: v is a softplus, the refinement network's convolutions are as large as the
decoder's, lambda begins as learnt numbers that all slots share, and initial weights are Sonnet's
(`models.initial_weights`). Ours is where lambda begins: uniform in [-0.5, 0.5].
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iio_kernels
from models.recipe import SMOKE, Recipe
from models.scene import Scene, signed


def coordinates(resolution: tuple[int, int]) -> Tensor:
    """(2, H, W): row and column, each from -1 to 1."""
    return torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in resolution), indexing="ij"))


class Decoder(nn.Module):
    """The spatial-broadcast decoder: each latent (.., D) becomes a picture and the logit of a mask (.., 4, H, W).

    Four convolutions with ELU on the latent broadcast to H x W, two coordinates behind it, and a fifth to the four.
    """

    def __init__(self, latent_size: int, channels: int, kernel_size: int, resolution: tuple[int, int]) -> None:
        super().__init__()
        widths = [latent_size + 2, *[channels] * 4, 4]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, kernel_size, padding="same") for i, o in pairwise(widths))
        self.register_buffer("grid", coordinates(resolution), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        first, *others = self.convs
        D, half = z.shape[-1], first.kernel_size[0] // 2
        # The coordinates are the same for all latents and are convolved once; a latent is the same at every pixel.
        position = F.conv2d(self.grid.unsqueeze(0), first.weight[:, D:], first.bias, padding=half)[0]
        x = iio_kernels.broadcast_conv2d(
            z.flatten(0, -2), first.weight[:, :D], position, self.grid.shape[1:], padding=half
        )
        for conv in others:
            x = conv(F.elu(x))
        return x.unflatten(0, z.shape[:-1])


class MapNorm(nn.GroupNorm):
    """LayerNorm of maps (B, K, C, H, W), each over its channels and pixels, with gain and offset for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous: the gradient of torch's own crashes on a slice of channels-last memory.
        return super().forward(x.flatten(0, 1).contiguous()).unflatten(0, x.shape[:2])


class Refinement(nn.Module):
    """The refinement network: from what L tells of a posterior lambda (B, K, 2 D) to the next.

    Convolutions with ELU on the 17 maps of a slot, their mean over pixels, an MLP with ELU; lambda and its
    gradient behind the result; an LSTM, where there is one; and a linear map to what is added to lambda.
    """

    MAPS = 17

    def __init__(
        self,
        latent_size: int,
        channels: int,
        kernel_size: int,
        layers: int,
        stride: int,
        mlp_sizes: tuple[int, ...],
        lstm_size: int | None,
        resolution: tuple[int, int],
    ) -> None:
        super().__init__()
        size = 2 * latent_size
        self.norm_d_means, self.norm_d_logits = MapNorm(3), MapNorm(1)
        self.norm_likelihood, self.norm_leave_one_out = MapNorm(1), MapNorm(1)
        self.norm_d_posterior = nn.LayerNorm(size)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, kernel_size, stride, padding=kernel_size // 2)
            for i, o in pairwise([self.MAPS, *[channels] * layers])
        )
        self.mlp = nn.Sequential()
        for i, o in pairwise([channels, *mlp_sizes]):
            self.mlp.extend([nn.Linear(i, o), nn.ELU()])
        width = mlp_sizes[-1] + 2 * size
        self.lstm = nn.LSTMCell(width, lstm_size) if lstm_size else None
        self.head = nn.Linear(lstm_size or width, size)
        self.register_buffer("grid", coordinates(resolution), persistent=False)

    def forward(
        self,
        image: Tensor,
        decoded: Tensor,
        mixture: iio_kernels.SpatialMixture,
        posterior: Tensor,
        d_posterior: Tensor,
        state: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The next lambda, and the LSTM's state, None before the first iteration."""
        B, K = posterior.shape[:2]
        x = self.maps(image, decoded, mixture)
        for conv in self.convs:
            x = F.elu(conv(x))
        hidden = torch.cat(
            [self.mlp(x.mean((2, 3))).unflatten(0, (B, K)), posterior, self.norm_d_posterior(d_posterior)], -1
        )
        if self.lstm is not None:
            state = self.lstm(hidden.flatten(0, 1), state)
            hidden = state[0].unflatten(0, (B, K))
        return posterior + self.head(hidden), state

    def maps(self, image: Tensor, decoded: Tensor, mixture: iio_kernels.SpatialMixture) -> Tensor:
        """The inputs of the paper's appendix that have pixels: (B K, 17, H, W).

        Likelihoods are logarithms. The one that leaves slot k out is, as printed, that of the others; the published
        program takes the difference of the two.
        """
        B, K, _, H, W = decoded.shape
        maps = [
            decoded,  # means and mask logits
            mixture.masks.unsqueeze(2),
            mixture.posterior.unsqueeze(2),
            self.norm_d_means(mixture.d_means),
            self.norm_d_logits(mixture.d_logits.unsqueeze(2)),
            self.norm_leave_one_out(mixture.leave_one_out.unsqueeze(2)),
            # The same for all slots:
            self.norm_likelihood(mixture.log_likelihood.detach()[:, None, None]),
            image.unsqueeze(1),
            self.grid,
        ]
        return torch.cat([x.expand(B, K, -1, H, W) for x in maps], 2).flatten(0, 1)


class IODINE(nn.Module):
    """Image -> K latents -> image: see `Scene` for what comes out.

    Defaults are those of Tetrominoes in the authors' program. `IODINE.configurations` and `IODINE.program` have what
    their text and their program take for each data set; see the module.

    Args:
        resolution: (H, W) of the images.
        latent_size: D, the width of a slot's latent.
        channels, kernel_size: of the hidden convolutions; the size odd.
        refinement_channels, refinement_kernel_size: the same of the refinement network, where they differ.
        refinement_layers, refinement_stride: how many convolutions the refinement network has, and the stride of each.
        mlp_sizes: widths of the refinement network's MLP.
        lstm_size: width of its LSTM; None: there is none.
        sigma: standard deviation of a pixel, for images in [0, 1].
        weigh_first: True: n = T losses, weighted 1 / T to 1, as printed; False: n = T + 1, weighted 0 to 1, as
            programmed.
        num_slots, iterations: K, at least 2, and T, unless a call says otherwise.
    """

    #: By data set, what the paper prints.
    configurations: ClassVar[dict[str, dict[str, Any]]] = {
        "tetrominoes": dict(
            resolution=(35, 35), latent_size=32, channels=32, kernel_size=5, refinement_layers=3, refinement_stride=1,
            mlp_sizes=(128,), lstm_size=None, weigh_first=True, num_slots=4,
        ),
        "multi-dsprites": dict(
            resolution=(64, 64), latent_size=16, channels=32, kernel_size=5, refinement_layers=3, refinement_stride=1,
            mlp_sizes=(128,), lstm_size=128, weigh_first=True, num_slots=6,
        ),
        "clevr6": dict(
            resolution=(128, 128), latent_size=64, channels=64, kernel_size=3, refinement_layers=4, refinement_stride=2,
            mlp_sizes=(256,), lstm_size=256, weigh_first=True, num_slots=7,
        ),
    }  # fmt: skip

    #: By data set, what the authors' program has.
    program: ClassVar[dict[str, dict[str, Any]]] = {
        name: each | dict(refinement_stride=2, mlp_sizes=(256, 256) if name == "clevr6" else (128,), weigh_first=False)
        for name, each in configurations.items()
    }

    def __init__(
        self,
        resolution: tuple[int, int] = (35, 35),
        *,
        latent_size: int = 32,
        channels: int = 32,
        kernel_size: int = 5,
        refinement_channels: int | None = None,
        refinement_kernel_size: int | None = None,
        refinement_layers: int = 3,
        refinement_stride: int = 2,
        mlp_sizes: tuple[int, ...] = (128,),
        lstm_size: int | None = None,
        sigma: float = 0.1,
        weigh_first: bool = False,
        num_slots: int = 4,
        iterations: int = 5,
    ) -> None:
        super().__init__()
        self.resolution, self.latent_size, self.sigma = tuple(resolution), latent_size, sigma
        self.num_slots, self.iterations, self.weigh_first = num_slots, iterations, weigh_first
        self.initial = nn.Parameter(torch.empty(2 * latent_size).uniform_(-0.5, 0.5))
        self.decoder = Decoder(latent_size, channels, kernel_size, resolution)
        self.refinement = Refinement(
            latent_size,
            refinement_channels or channels,
            refinement_kernel_size or kernel_size,
            refinement_layers,
            refinement_stride,
            mlp_sizes,
            lstm_size,
            resolution,
        )

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(n, K, D): of the standard normal numbers that draw an image's latents, one set for each L_t."""
        return self.num_losses(self.iterations), self.num_slots, self.latent_size

    def num_losses(self, iterations: int) -> int:
        """n, of T iterations."""
        return iterations if self.weigh_first else iterations + 1

    def forward(
        self,
        image: Tensor,
        *,
        num_slots: int | None = None,
        iterations: int | None = None,
        noise: Tensor | None = None,
    ) -> Scene:
        """Explain images (B, 3, H, W) in [0, 1], or sequences (B, n, 3, H, W) of them, a frame for each L_t.

        Of a sequence, L_t is that of frame t, which then improves lambda_t: each frame is predicted from those before
        it, and the scene is the prediction of the last.

        The latents are drawn by standard normal `noise` (B, n, K, D) where given, which then says T and K, or
        else by torch's own random numbers, for `num_slots` slots and `iterations` iterations.
        """
        frames, noise = self.prepare(image, num_slots, iterations, noise)
        B, n, K = noise.shape[:3]
        T = n - self.num_losses(0)
        differentiated = torch.is_grad_enabled()
        posterior, state, loss = self.initial.expand(B, K, -1), None, 0.0
        for t in range(n):
            x, last = frames[:, t], t == n - 1
            # lambda needs the gradient of L even where nobody asks for those of the weights.
            with torch.enable_grad():
                if not last and not (differentiated and posterior.requires_grad):
                    posterior = posterior.detach().requires_grad_()
                mean, variance = moments(posterior)
                divergence = 0.5 * (variance + mean.square() - 1 - variance.log()).sum((1, 2))
                decoded = self.decoder(mean + variance.sqrt() * noise[:, t])
                mixture = iio_kernels.spatial_mixture(x, decoded, sigma=self.sigma)
                if not last:
                    d_L = torch.ones_like(divergence), mixture.d_decoded.to(decoded.dtype)
                    (d_posterior,) = torch.autograd.grad([divergence, decoded], posterior, d_L, retain_graph=True)
            L = divergence - mixture.log_likelihood.sum((1, 2))
            loss = loss + (t + self.weigh_first) / T * L.mean()
            if not last:
                posterior, state = self.refinement(x, decoded, mixture, posterior, d_posterior, state)

        pictures, mask_logits = decoded.split([3, 1], 2)
        return Scene(torch.cat([signed(pictures), mask_logits], 2), posterior, loss=loss)

    def prepare(
        self, image: Tensor, num_slots: int | None, iterations: int | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Frames (B, n, 3, H, W) in [0, 1], and noise (B, n, K, D)."""
        (H, W), D, least = self.resolution, self.latent_size, self.num_losses(1)
        if image.dim() not in (4, 5) or tuple(image.shape[-3:]) != (3, H, W):
            raise ValueError(f"image: expected shape (B, 3, {H}, {W}) or (B, n, 3, {H}, {W}), got {tuple(image.shape)}")
        if noise is None:
            K = self.num_slots if num_slots is None else num_slots
            T = self.iterations if iterations is None else iterations
            if iterations is None and image.dim() == 5:
                T = image.shape[1] - self.num_losses(0)
            for name, number, lowest in (("num_slots", K, 2), ("iterations", T, 1)):
                if number < lowest:
                    raise ValueError(f"{name}: expected an int >= {lowest}, got {number}")
            noise = torch.randn(len(image), self.num_losses(T), K, D, device=image.device, dtype=image.dtype)
        elif noise.dim() != 4 or len(noise) != len(image) or noise.shape[1] < least or noise.shape[3] != D:
            raise ValueError(
                f"noise: expected shape (B, n, K, D), n >= {least} and D = {D}, to match image {tuple(image.shape)}, "
                f"got {tuple(noise.shape)}"
            )
        n = noise.shape[1]
        if image.dim() == 5 and image.shape[1] != n:
            raise ValueError(
                f"image: expected {n} frames for {n - self.num_losses(0)} iterations, got shape {tuple(image.shape)}"
            )
        frames = image if image.dim() == 5 else image.unsqueeze(1).expand(-1, n, -1, -1, -1)
        return frames, noise


def moments(posterior: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (.., D) of a latent with parameters lambda (.., 2 D)."""
    mean, before_softplus = posterior.chunk(2, -1)
    return mean, F.softplus(before_softplus)


def build(
    resolution: tuple[int, int],
    *,
    channels: int,
    kernel_size: int,
    input_size: int,
    slot_size: int,
    num_slots: int,
    iterations: int,
    pixel_sigma: float,
    iodine_source: Literal["text", "program"],
    network_of: str,
) -> IODINE:
    """The network that `train.py` trains: `network_of` a data set, but for the sizes that are given."""
    published = (IODINE.configurations if iodine_source == "text" else IODINE.program)[network_of]
    own = dict(
        resolution=resolution, latent_size=slot_size, channels=channels, kernel_size=kernel_size, sigma=pixel_sigma,
        refinement_channels=input_size, refinement_kernel_size=published["kernel_size"],
        mlp_sizes=(4 * input_size,) * len(published["mlp_sizes"]), num_slots=num_slots, iterations=iterations,
    )  # fmt: skip
    return IODINE(**published | own)


PRESETS: dict[str, dict[str, Any]] = {
    # Appendix C as printed, of Tetrominoes; the program's recipe differs (see the module), but for initial weights, on
    # which the text is silent. Fine-tuning is ours.
    "paper": dict(
        steps=1_000_000, fine_tune_steps=100_000, num_scenes=60_000, eval_scenes=320, iodine_source="text",
        channels=32, kernel_size=5, input_size=32, slot_size=32, iterations=5, pixel_sigma=0.1, batch_size=32,
        optimizer="adam", lr=3e-4, fine_tune_lr=3e-4, warmup_steps=0, half_life=10**9, clip=5.0,
        fine_tune_warmup_steps=0, margin=4e-4, hinge_scale=1e3, initial_weights="sonnet",
    ),
    "quick": dict(
        steps=6000, fine_tune_steps=1000, num_scenes=60_000, eval_scenes=320, iodine_source="program",
        channels=16, kernel_size=3, input_size=64, slot_size=32, iterations=3, pixel_sigma=0.3, batch_size=8,
        optimizer="muon", lr=1e-3, fine_tune_lr=5e-4, warmup_steps=100, half_life=3000, clip=5.0,
        fine_tune_warmup_steps=100, margin=4e-4, hinge_scale=1e3, initial_weights="own",
    ),
    "smoke": SMOKE | dict(
        channels=8, kernel_size=3, input_size=8, slot_size=8, iterations=2, pixel_sigma=0.3, clip=5.0,
        iodine_source="program",
    ),
}  # fmt: skip

#: The sizes of the text.
PUBLISHED = {
    ("paper", "multi-dsprites"): dict(slot_size=16),
    ("paper", "clevr6"): dict(slot_size=64, channels=64, input_size=64, kernel_size=3),
}

RECIPES = (
    Recipe(
        "iodine", "IODINE", "Greff et al. 2019", "discovery", build, PRESETS, PUBLISHED,
        least_slots=2, unsaid={"iodine_source": "program"},
    ),
)  # fmt: skip
