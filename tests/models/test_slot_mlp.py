"""Slot MLP: an ordered set of slots, from all inputs at once."""

import torch

from models.set_prediction import SetPredictor
from models.slot_mlp import SlotMLP, SlotMLPAutoEncoder


def shapes_of(slot_mlp):
    return {name: tuple(p.shape) for name, p in slot_mlp.named_parameters() if name.endswith("weight")}


def test_layers_for_object_discovery():
    """Table 9 of the supplement, at Tetrominoes' size."""
    assert shapes_of(SlotMLPAutoEncoder().slot_mlp) == {
        "mlp.0.weight": (512, 16 * 16 * 32),
        "mlp.2.weight": (1024, 512),
        "mlp.4.weight": (1024, 1024),
        "mlp.6.weight": (4 * 64, 1024),
        "slot_mlp.0.weight": (64, 64),
        "slot_mlp.2.weight": (64, 64),
    }


def test_layers_for_property_prediction():
    """Table 8 of the supplement, at CLEVR10's size: what reads the slots is the same as Slot Attention's."""
    model = SetPredictor(slots="mlp")
    assert shapes_of(model.slots) == {
        "mlp.0.weight": (512, 16 * 16 * 64),
        "mlp.2.weight": (512, 512),
        "mlp.4.weight": (10 * 64, 512),
    }
    assert shapes_of(model.classifier) == {"0.weight": (64, 64), "2.weight": (19, 64)}


def test_what_follows_is_shared_by_the_slots():
    slots = SlotMLP(1, 3, 2, (4, 4), hidden_sizes=(5,), slot_hidden_size=7)
    with torch.no_grad():
        slots.mlp[-1].weight[:3] = slots.mlp[-1].weight[3:]
        slots.mlp[-1].bias[:3] = slots.mlp[-1].bias[3:]
    first, second = slots(torch.rand(6, 16, 1)).unbind(1)
    assert torch.equal(first, second)


def test_a_large_grid_is_resized_and_a_small_one_is_not():
    x = torch.linspace(0, 1, 35).expand(1, 1, 35, 35)  # rises from left to right
    inputs = x.flatten(2).mT
    slots = SlotMLP(1, 3, 2, (35, 35), grid=4, hidden_sizes=(5,), slot_hidden_size=None)
    seen = {}
    slots.mlp.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    assert slots(inputs).shape == (1, 2, 3)
    rows = seen["x"].view(4, 4)
    torch.testing.assert_close(rows[0], rows[3])
    torch.testing.assert_close(rows[0], torch.linspace(0, 1, 9)[1::2], rtol=0, atol=0.02)
    slots = SlotMLP(1, 3, 2, (6, 7), hidden_sizes=(5,), slot_hidden_size=None)
    assert slots.mlp[0].in_features == 6 * 7


def test_slots_are_ordered_and_need_no_noise():
    torch.manual_seed(0)
    model = SlotMLPAutoEncoder((12, 11), channels=4, kernel_size=3, num_slots=3, slot_mlp={"hidden_sizes": (8,)})
    image = torch.rand(2, 3, 12, 11)
    scene = model(image, noise=torch.randn(2, *model.noise_shape))
    assert torch.equal(scene.decoded, model(image).decoded)
    assert scene.decoded.shape == (2, 3, 4, 12, 11)
    loss, masks, error = scene.objective(image)
    assert loss is error
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 12, 11))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
