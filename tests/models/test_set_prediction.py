"""Set prediction: layers as published, losses that know no order, average precision by hand and by brute force."""

import itertools
import math

import pytest
import torch

from data.metrics import average_precision
from data.properties import NUM_PROPERTIES
from models.set_prediction import SetPredictor, pairwise_cost, set_loss


def thing(place, size=0, material=0, shape=0, color=0, real=1.0):
    """One object, or one prediction of certainty `real`."""
    x = torch.zeros(NUM_PROPERTIES)
    x[:3] = torch.tensor(place)
    for first, kind in ((3, size), (5, material), (7, shape), (10, color)):
        x[first + kind] = 1
    x[18] = real
    return x


def scenes(batch, count, seed, kinds=2):
    """Random objects (batch, count, 19), few kinds so that several match, the last of each scene often none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    rows = []
    for _ in range(batch * count):
        place = torch.rand(3, generator=generator).tolist()
        rows.append(thing(place, draw(2), 0, draw(kinds), 0, float(torch.rand((), generator=generator))))
    return torch.stack(rows).view(batch, count, -1)


# ------------------------------------------------------------------------------------------- the model


def test_layers_are_those_of_the_supplement():
    model = SetPredictor()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("slots.")}
    assert shapes == {
        "encoder.convs.0.weight": (64, 3, 5, 5),
        **{f"encoder.convs.{i}.weight": (64, 64, 5, 5) for i in (1, 2, 3)},
        **{f"encoder.convs.{i}.bias": (64,) for i in range(4)},
        **{"encoder.position.dense.weight": (64, 4), "encoder.position.dense.bias": (64,)},
        **{"encoder.norm.weight": (64,), "encoder.norm.bias": (64,)},
        **{f"encoder.mlp.{i}.weight": (64, 64) for i in (0, 2)},
        **{f"encoder.mlp.{i}.bias": (64,) for i in (0, 2)},
        **{"classifier.0.weight": (64, 64), "classifier.0.bias": (64,)},
        **{"classifier.2.weight": (19, 64), "classifier.2.bias": (19,)},
    }
    assert [conv.stride[0] for conv in model.encoder.convs] == [1, 2, 2, 1]
    assert model.encoder(torch.rand(1, 3, 128, 128)).shape == (1, 32 * 32, 64)
    assert model.noise_shape == (10, 64)


@pytest.mark.parametrize("slots", ["attention", "mlp"])
def test_predictions(slots):
    model = SetPredictor((24, 20), channels=8, kernel_size=3, num_slots=5, slots=slots)
    image, noise = torch.rand(2, 3, 24, 20), torch.randn(2, *model.noise_shape)
    predicted = model(image, noise=noise)
    assert predicted.shape == (2, 5, 19)
    assert ((predicted > 0) & (predicted < 1)).all()
    steps = model(image, noise=noise, stepwise=True)
    assert steps.shape == (3 if slots == "attention" else 1, 2, 5, 19)
    torch.testing.assert_close(steps[-1], predicted)


# ------------------------------------------------------------------------------------------- the loss


def literal_loss(predicted, objects, scale=1.0):
    """Of all ways to match, the cheapest: Huber's loss, half the square below 1 and linear above.

    Predictions without an object are to be rows of zeros.
    """
    total = 0.0
    objects = torch.cat([objects, objects.new_zeros(len(objects), predicted.shape[1] - objects.shape[1], 19)], 1)
    for p, o in zip(predicted, objects, strict=True):
        best = math.inf
        for chosen in itertools.permutations(range(len(p))):
            difference = p[list(chosen)] - o
            difference[:, :3] *= scale
            size = difference.abs()
            best = min(best, torch.where(size < 1, size**2 / 2, size - 0.5).mean(1).sum().item())
        total += best
    return total / len(predicted)


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_the_loss_is_that_of_the_best_matching(scale):
    predicted, objects = scenes(3, 5, seed=0).double(), scenes(3, 4, seed=1).double()
    assert set_loss(predicted, objects, scale).item() == pytest.approx(literal_loss(predicted, objects, scale))


def test_fewer_predictions_than_rows_are_matched_with_objects_first():
    objects = torch.zeros(2, 6, 19)
    objects[:, 1::2] = torch.stack([thing((0.1 * i, 0.5, 0.5), color=i) for i in range(3)])
    nothing = torch.zeros(2, 4, 19)
    torch.testing.assert_close(set_loss(nothing, objects), set_loss(torch.zeros(2, 6, 19), objects))
    torch.testing.assert_close(set_loss(nothing[:, :2], objects), set_loss(nothing[:, :2], objects[:, [1, 3]]))
    torch.testing.assert_close(set_loss(nothing.expand(3, -1, -1, -1), objects), set_loss(nothing, objects))


def test_the_loss_knows_no_order():
    predicted, objects = scenes(2, 4, seed=0), scenes(2, 4, seed=1)
    expected = set_loss(predicted, objects)
    torch.testing.assert_close(set_loss(predicted.flip(1), objects.roll(1, 1)), expected)
    torch.testing.assert_close(set_loss(objects.flip(1), objects), torch.zeros(()))


def test_the_loss_after_every_iteration_is_the_mean_of_theirs():
    predicted, objects = torch.stack([scenes(2, 4, seed=s) for s in range(3)]), scenes(2, 4, seed=9)
    each = [set_loss(p, objects) for p in predicted]
    torch.testing.assert_close(set_loss(predicted, objects), torch.stack(each).mean())


def test_a_prediction_that_is_no_number_is_seen_in_the_loss():
    predicted = scenes(2, 4, seed=0)
    predicted[0, 1, 2] = math.nan
    assert set_loss(predicted, scenes(2, 4, seed=1)).isnan()
    assert pairwise_cost(predicted, predicted).isnan().sum() == 4 + 3


# ------------------------------------------------------------------------------------------- average precision


def literal_precision(predicted, objects, distance):
    """The published procedure, detection by detection."""
    flat = sorted(
        ((p[-1].item(), b, k) for b, scene in enumerate(predicted) for k, p in enumerate(scene)), key=lambda x: -x[0]
    )
    found, hits, curve = set(), 0, []
    total = sum((o[-1] == 1).item() for scene in objects for o in scene)
    for rank, (_, b, k) in enumerate(flat, 1):
        p, best, where = predicted[b, k], math.inf, None
        for m, o in enumerate(objects[b]):
            same = all(p[i:j].argmax() == o[i:j].argmax() for i, j in ((3, 5), (5, 7), (7, 10), (10, 18)))
            away = 6 * (p[:3] - o[:3]).norm().item()
            if o[-1] == 1 and same and away < best:
                best, where = away, (b, m)
        if where is not None and best < distance and where not in found:
            found.add(where)
            hits += 1
        curve.append((hits / total, hits / rank))
    recalls = [0.0] + [r for r, _ in curve] + [1.0]
    precisions = [0.0] + [p for _, p in curve] + [0.0]
    for i in range(len(precisions) - 1, 0, -1):
        precisions[i - 1] = max(precisions[i - 1], precisions[i])
    return sum(precisions[i + 1] * (recalls[i + 1] - recalls[i]) for i in range(len(recalls) - 1))


@pytest.mark.parametrize("distance", [math.inf, 3.0, 1.0, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_precision_is_that_of_the_published_procedure(seed, distance):
    predicted, objects = scenes(4, 5, seed, kinds=3), scenes(4, 3, seed + 100, kinds=3)
    objects[..., -1] = (objects[..., -1] > 0.3).float()
    expected = literal_precision(predicted, objects, distance)
    assert average_precision(predicted, objects, distance) == pytest.approx(expected)


def test_precision_by_hand():
    near, far = (0.5, 0.5, 0.5), (0.5, 0.5, 0.9)  # 2.4 apart on CLEVR's scale
    objects = torch.stack([thing(near), thing(near, color=3)]).unsqueeze(0)

    def precision(*predicted, distance=math.inf):
        return average_precision(torch.stack(predicted).unsqueeze(0), objects, distance)

    red, wrong = thing(near, color=3, real=0.9), thing(near, color=4, real=0.8)
    assert precision(red, thing(near, real=0.1)) == 1
    assert precision(red, wrong) == 0.5  # the first is right, the second object is never found
    assert precision(wrong, thing(near, real=0.5)) == pytest.approx(0.25)  # found second: precision 1/2, recall 1/2
    assert precision(red, thing(near, color=3, real=0.8), thing(near, real=0.5)) == pytest.approx((1 + 2 / 3) / 2)
    assert precision(thing(far, real=0.9), red) == 1
    assert precision(thing(far, real=0.95), red, distance=2.0) == pytest.approx(0.25)
    assert precision(wrong) == 0
    assert math.isnan(average_precision(objects, torch.zeros(1, 2, 19)))


def test_confidence_orders_over_all_scenes():
    objects = torch.stack([thing((0.1, 0.1, 0.1)), thing((0.9, 0.9, 0.9), color=2)]).unsqueeze(1)
    sure = torch.stack([thing((0.1, 0.1, 0.1), real=0.9), thing((0.9, 0.9, 0.9), color=1, real=0.2)]).unsqueeze(1)
    unsure = torch.stack([thing((0.1, 0.1, 0.1), real=0.2), thing((0.9, 0.9, 0.9), color=1, real=0.9)]).unsqueeze(1)
    assert average_precision(sure, objects) == 0.5
    assert average_precision(unsure, objects) == 0.25
