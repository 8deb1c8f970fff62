"""Initial weights by the defaults of the libraries that published programs are written in, which are not PyTorch's.

Where a paper is silent on them, its authors' program decides, and where that is silent, too, its library does:

- `as_keras`: Slot Attention (its program leaves all at Keras' default).
- `as_sonnet`: IODINE (likewise, in Sonnet), and MONet, whose appendix draws weights from a truncated normal of a
  deviation that it does not print, and sets biases to 0.

DSPN needs none: models/dspn.py does what its program writes out.
"""

from collections.abc import Callable

import torch
from torch import nn

LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
CELLS = (nn.GRUCell, nn.LSTMCell)


@torch.no_grad()
def as_keras(model: nn.Module) -> None:
    """Glorot's uniform rule for layers and what cells take in, orthogonal recurrent weights, biases 0 (forget gates 1).

    What is learnt outside of layers and cells, and the gains and offsets of normalisations, stay as they are.
    """
    for module in model.modules():
        if isinstance(module, LAYERS):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, CELLS):
            nn.init.xavier_uniform_(module.weight_ih)
            nn.init.orthogonal_(module.weight_hh)
        _set_biases(module)


@torch.no_grad()
def as_sonnet(model: nn.Module) -> None:
    """Normal of deviation 1 / sqrt(inputs of a unit), none beyond two deviations; biases 0 (forget gates 1).

    What is learnt outside of layers and cells, and the gains and offsets of normalisations, stay as they are.
    """
    for module in model.modules():
        if isinstance(module, LAYERS):
            inputs = module.weight[0].numel()
            if isinstance(module, nn.ConvTranspose2d):
                inputs = module.in_channels * module.weight[0, 0].numel()
            _truncated_normal(module.weight, inputs)
        elif isinstance(module, CELLS):
            # One matrix for what comes in and what is remembered.
            for weight in (module.weight_ih, module.weight_hh):
                _truncated_normal(weight, module.input_size + module.hidden_size)
        _set_biases(module)


#: By name.
RULES: dict[str, Callable[[nn.Module], None]] = {"keras": as_keras, "sonnet": as_sonnet}


def _truncated_normal(weight: torch.Tensor, inputs: int) -> None:
    deviation = inputs**-0.5
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def _set_biases(module: nn.Module) -> None:
    if isinstance(module, LAYERS) and module.bias is not None:
        module.bias.zero_()
    elif isinstance(module, CELLS):
        module.bias_ih.zero_()
        module.bias_hh.zero_()
        if isinstance(module, nn.LSTMCell):
            module.bias_ih[module.hidden_size : 2 * module.hidden_size] = 1
