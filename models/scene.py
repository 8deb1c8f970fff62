"""What a model makes of images: pictures and masks, one of each for every slot."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

import iio_kernels


def signed(image: Tensor) -> Tensor:
    """Values in [0, 1] on [-1, 1], where the published networks see images and errors are measured."""
    return image * 2 - 1


class Scene(NamedTuple):
    """How a model explains a batch of images."""

    decoded: Tensor
    """(B, K, 4, H, W): each slot's picture in [-1, 1] (not clamped) and, last, the logit of its mask, in the decoder's
    dtype. MONet's logits are the attention's log m_k: all m_k sum to one."""
    slots: Tensor
    """(B, K, D): the slots after the last iteration; of MONet the latents z, drawn from q(z | x, m). (B, K, 2 D) of
    IODINE: lambda, the mean m of each latent and, behind it, what a softplus makes its variance v."""
    attention: Tensor | None = None
    """(B, K, N): of Slot Attention, from the last iteration, over the encoder's N = H * W inputs; a softmax over K."""
    loss: Tensor | None = None
    """Scalar, mean over images: what the model minimises, in nats; None: the error of its reconstruction."""

    def compose(self) -> tuple[Tensor, Tensor]:
        """The reconstruction (B, 3, H, W) in [-1, 1], and the masks (B, K, H, W), a softmax over K, that weight the
        pictures."""
        return iio_kernels.compose(self.decoded)

    def objective(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What training minimises; the masks; and the mean squared error of the reconstruction, on [-1, 1].

        `image` (B, 3, H, W) is in [0, 1]; of a sequence (B, n, 3, H, W) the reconstruction is that of the last.
        """
        image = image[:, -1] if image.dim() == 5 else image
        error, masks = iio_kernels.composition_error(signed(image), self.decoded, return_masks=True)
        return error if self.loss is None else self.loss, masks, error
