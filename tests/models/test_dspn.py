"""DSPN is the published one: layers, featurewise sort pooling, and a descent that training goes through."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from data.metrics import average_precision
from models.dspn import DSPN, FSPool, ImageEncoder, SetEncoder, representation_loss
from models.scene import signed
from models.set_prediction import set_loss
from training.config import Config
from training.losses import apply_model, losses


def small(**options):
    torch.manual_seed(0)
    return DSPN((16, 16), **dict(channels=2, latent_size=6, num_slots=4, iterations=3) | options)


def test_layers_are_those_of_the_published_code():
    with torch.device("meta"):
        *resnet, before_last, last, _ = ImageEncoder((128, 128), 512, 64)
    # torchvision's resnet34 without its last layer; its counts are the model card's.
    assert sum(p.numel() for layer in resnet for p in layer.parameters()) == 21_797_672 - (512 * 1000 + 1000)
    blocks = [block for block in resnet if type(block).__name__ == "BasicBlock"]
    assert [block.residual[0][0].out_channels for block in blocks] == [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3
    assert [i for i, block in enumerate(blocks) if block.residual[0][0].stride == (2, 2)] == [3, 7, 13]
    assert before_last[0].weight.shape == (512, 512, 3, 3)
    assert last.weight.shape == (512, 512, 2, 2)
    model = DSPN(channels=1, latent_size=512)
    others = {n: tuple(p.shape) for n, p in model.named_parameters() if not n.startswith("image_encoder.")}
    assert others == {
        "start": (10, 19),
        "set_encoder.pair.weight": (512, 2 * 19),
        "set_encoder.pair.bias": (512,),
        "set_encoder.relation.weight": (512, 512),
        "set_encoder.relation.bias": (512,),
        "set_encoder.pool.weight": (21, 512),
    }
    assert (model.iterations, 32 * model.inner_rate) == (10, 800)
    assert (model.start[:, -1] == 0.5).all()
    assert model(torch.rand(1, 3, 128, 128)).shape == (1, 10, 19)


@pytest.mark.parametrize("resolution", [(128, 128), (64, 96), (70, 33)])
def test_images_of_any_size_end_in_one_vector(resolution):
    encoder = ImageEncoder(resolution, 5, 1).eval()
    assert encoder(torch.rand(2, 3, *resolution)).shape == (2, 5)


@pytest.mark.parametrize(
    ("x", "weights"),
    [
        ([5.0], [1]),
        ([5.0, 7.0], [1, 3]),
        ([5.0, 7.0, 6.0], [1, -4, 3]),
        ([5.0, 7.0, 6.0, 9.0, 8.0], [1, -1.5, -4, -0.5, 3]),
        ([5.0, 7.0, 6.0, 9.0], [1, -4 + 5 / 3, -4 + 7 / 3, 3]),
    ],
    ids=lambda x: len(x),
)
def test_pooling_by_hand(x, weights):
    """Two pieces, with weights 1, -4 and 3 at their ends: what lies between them is interpolated. And a plain sum."""
    pool = FSPool(2, pieces=2)
    pool.weight.data = torch.tensor([[1.0, 1.0], [-4.0, 1.0], [3.0, 1.0]])
    expected = sum(a * w for a, w in zip(sorted(x, reverse=True), weights, strict=True))
    pooled = pool(torch.tensor([x, x]).mT)
    torch.testing.assert_close(pooled, torch.tensor([expected, sum(x)]))


def literal_encoding(encoder, elements):
    """All pairs, one after the other; each feature sorted, and weighted piece by piece."""
    pairs = [torch.cat([a, b]) for a in elements for b in elements]
    relations = torch.stack([encoder.relation(encoder.pair(pair).relu()) for pair in pairs]) / len(pairs)
    pooled = []
    for feature, w in zip(relations.unbind(1), encoder.pool.weight.unbind(1), strict=True):
        value = 0
        for rank, y in enumerate(sorted(feature, reverse=True)):
            place = 20 * rank / (len(pairs) - 1)
            left = min(int(place), 19)
            value = value + y * (w[left] * (left + 1 - place) + w[left + 1] * (place - left))
        pooled.append(value)
    return torch.stack(pooled)


def test_the_set_encoder_is_that_of_all_pairs_and_knows_no_order():
    torch.manual_seed(0)
    encoder = SetEncoder(3, 5, 7).double()
    for size in (2, 4):
        elements = torch.rand(2, size, 3, dtype=torch.double)
        encoded = encoder(elements)
        torch.testing.assert_close(encoded, torch.stack([literal_encoding(encoder, each) for each in elements]))
        torch.testing.assert_close(encoder(elements.flip(1).roll(1, 1)), encoded)


def literal_descent(model, z):
    """Algorithm 1, an image at a time."""
    predicted = []
    for target in z:
        Y = model.start
        for _ in range(model.iterations):
            loss = F.smooth_l1_loss(literal_encoding(model.set_encoder, Y), target)
            Y = Y - model.inner_rate * torch.autograd.grad(loss, Y, create_graph=True)[0]
            Y = torch.cat([Y[:, :-1], Y[:, -1:].clamp(0, 1)], 1)
        predicted.append(Y)
    return torch.stack(predicted)


def test_the_descent_and_its_gradients_are_those_of_algorithm_1():
    model = small(iterations=2, num_slots=3, latent_size=4).double()
    z = torch.randn(2, 4, dtype=torch.double, requires_grad=True)
    sources = (z, *model.set_encoder.parameters(), model.start)
    found = []
    for predicted in (model.descend(z)[-1], literal_descent(model, z)):
        toward = torch.linspace(-1, 1, predicted.numel(), dtype=torch.double).view_as(predicted)
        found.append((predicted, *torch.autograd.grad((predicted * toward).sum(), sources)))
    for ours, theirs in zip(*found, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


def test_every_step_lowers_the_representation_loss():
    model = small(iterations=20)
    z = model.set_encoder(torch.rand(5, 4, 19))
    with torch.no_grad():
        losses = torch.stack([representation_loss(model.set_encoder(Y), z) for Y in model.descend(z)])
    assert (losses[1:] < losses[:-1]).all()
    assert (losses[-1] < 0.5 * losses[0]).all()


def test_predictions_do_not_depend_on_the_batch_nor_on_gradients():
    """Not even without either: the descent makes its own."""
    model, image = small().eval(), torch.rand(3, 3, 16, 16)
    steps = model(image, stepwise=True)
    assert steps.shape == (3, 3, 4, 19)
    assert ((steps[..., -1] >= 0) & (steps[..., -1] <= 1)).all()
    with torch.no_grad():
        alone = torch.cat([model(each) for each in image.split(1)])
    assert not alone.requires_grad
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(alone, steps[-1])
    model.iterations = 7
    assert model(image, stepwise=True).shape == (7, 3, 4, 19)


def test_the_descent_is_float32_under_autocast():
    model, image = small().eval(), torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        z = model.image_encoder(signed(image))
        predicted, loss = model(image, objects=torch.rand(2, 4, 19))
    assert z.dtype == torch.bfloat16
    assert predicted.dtype == loss.dtype == torch.float32
    assert torch.equal(predicted, model.descend(z.float())[-1])
    (predicted.sum() + loss).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_scoring_leaves_the_averages_of_training_alone():
    model, pixels = small(), torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    config, first = Config(precision="fp32"), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        scored, _ = apply_model(model, pixels, torch.empty(3, 0), config)
    torch.testing.assert_close(model.state_dict(), first, rtol=0, atol=0)
    assert torch.equal(scored, model.eval()(pixels / 255))
    apply_model(model, pixels, torch.empty(3, 0), config)
    mean = "image_encoder.0.1.running_mean"
    assert not torch.equal(model.state_dict()[mean], first[mean])


def test_what_training_minimises_reaches_every_parameter():
    """The set loss, as the mean over its pairs, and a tenth of the true set's representation loss; up to a factor."""
    config = Config(task="set-prediction", model="dspn")
    model, image, objects = small(), torch.rand(6, 3, 16, 16), torch.rand(6, 4, 19)
    made = model(image, objects=objects)
    predicted, representation = made
    expected = representation_loss(model.set_encoder(objects), model.image_encoder(signed(image))).mean()
    torch.testing.assert_close(representation, expected)
    loss, parts = losses(made, image, "pre-training", config, objects)
    torch.testing.assert_close(loss / 4, set_loss(predicted, objects) / 4 + 0.1 * representation)
    torch.testing.assert_close(parts["loss"], set_loss(predicted, objects).detach())
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0} == set()
    assert all(math.isfinite(p.grad.abs().max()) for p in model.parameters())


def test_the_true_set_has_as_many_rows_as_the_predicted():
    """The set encoder tells sets by their number of rows, too."""
    model, image = small().eval(), torch.rand(2, 3, 16, 16)
    objects = torch.cat([torch.rand(2, 3, 19), torch.zeros(2, 3, 19)], 1)
    expected = representation_loss(model.set_encoder(objects[:, :4]), model.image_encoder(signed(image))).mean()
    for rows in (3, 4, 6):
        torch.testing.assert_close(model(image, objects=objects[:, :rows])[1], expected)


def test_four_sets_are_learnt_by_heart():
    """From a vector for each, by the descent alone."""
    model = small(latent_size=16, iterations=5)
    kinds = [F.one_hot(torch.randint(number, (4, 4)), number) for number in (2, 2, 3, 8)]
    objects = torch.cat([torch.rand(4, 4, 3), *kinds, torch.ones(4, 4, 1)], -1)
    z = torch.nn.Parameter(torch.zeros(4, 16))
    trained = [z, model.start, *model.set_encoder.parameters()]
    optimizer = torch.optim.Adam(trained, 1e-2)
    assert average_precision(model.descend(z)[-1], objects) < 0.2
    for _ in range(200):
        optimizer.zero_grad()
        set_loss(model.descend(z)[-1], objects).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    assert average_precision(model.descend(z)[-1], objects) > 0.4
