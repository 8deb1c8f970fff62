"""MONet is the paper's: layers, the masks' stick-breaking, and the loss; and it learns."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, Normal, kl_divergence

from models.monet import MONet
from training.building import build_model
from training.config import Config


def shapes(module):
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def layer(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}


def block(name, inputs, outputs):
    return {f"{name}.conv.weight": (outputs, inputs, 3, 3), f"{name}.bias": (outputs,)}


def test_layers_are_those_of_the_appendix():
    model = MONet()
    assert shapes(model.encoder) == {
        **layer("convs.0", 32, 4, 3, 3),
        **layer("convs.1", 32, 32, 3, 3),
        **layer("convs.2", 64, 32, 3, 3),
        **layer("convs.3", 64, 64, 3, 3),
        **layer("mlp.0", 256, 64 * 4 * 4),  # 64 pixels halved four times
        **layer("mlp.2", 32, 256),  # mean and log deviation of 16 numbers
    }
    assert shapes(model.decoder) == {
        **layer("convs.0", 32, 16 + 2, 3, 3),
        **{k: v for i in (1, 2, 3) for k, v in layer(f"convs.{i}", 32, 32, 3, 3).items()},
        **layer("to_rgba", 4, 32, 1, 1),
    }
    assert model.decoder.grid.shape == (2, 72, 72)
    assert shapes(model.attention) == {
        **block("down.0", 4, 32),
        **block("down.1", 32, 32),
        **block("down.2", 32, 64),
        **block("down.3", 64, 64),
        **block("down.4", 64, 64),
        **layer("mlp.0", 128, 64 * 4 * 4),
        **layer("mlp.2", 128, 128),
        **layer("mlp.4", 64 * 4 * 4, 128),
        **block("up.0", 64 + 64, 64),
        **block("up.1", 64 + 64, 64),
        **block("up.2", 64 + 64, 32),
        **block("up.3", 32 + 32, 32),
        **block("up.4", 32 + 32, 32),
        **layer("to_logits", 1, 32, 1, 1),
    }
    encoder, decoder = 1_184 + 9_248 + 18_496 + 36_928 + 262_400 + 8_224, 5_216 + 3 * 9_248 + 132
    down, up = 1_184 + 9_248 + 18_496 + 2 * 36_928, 2 * 73_792 + 36_896 + 2 * 18_464
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder + down + up + 131_200 + 16_512 + 132_096 + 33
    assert model.noise_shape == (7, 16)


@pytest.mark.parametrize(("side", "last"), [(28, 7), (35, 4), (64, 4), (128, 4)])
def test_what_is_trained_halves_images_of_every_size_to_a_few_pixels(side, last):
    config = Config(model="monet", channels=2, num_slots=2, slot_size=2, device="cpu",
                          pixel_sigma=0.1, background_sigma=0.06)  # fmt: skip
    model = build_model(config, (side, side))
    assert (model.sigma_first, model.sigma) == (0.06, 0.1)
    assert model.attention.mlp[0].in_features == 4 * last**2
    assert model(torch.rand(1, 3, side, side), noise=torch.zeros(1, 2, 2)).loss.isfinite()


def test_clevr_takes_six_blocks():
    model = MONet((128, 128), blocks=6)
    assert [b.conv.out_channels for b in model.attention.down] == [32, 32, 32, 64, 64, 64]
    assert [b.conv.out_channels for b in model.attention.up] == [64, 64, 32, 32, 32, 32]
    assert model.attention.mlp[0].in_features == 64 * 4 * 4


# The paper, word for word: no kernels, each slot by itself.


def unet(attention, x):
    def go(block, x):
        x = F.conv2d(x, block.conv.weight, padding=1)
        x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        return (x + block.bias.view(1, -1, 1, 1)).relu()

    skips = []
    for i, block in enumerate(attention.down):
        x = go(block, x)
        skips.append(x)
        if i < len(attention.down) - 1:
            x = x[:, :, ::2, ::2]
    for i in (0, 2, 4):
        x = (x.flatten(1) if i == 0 else x) @ attention.mlp[i].weight.T + attention.mlp[i].bias
        x = x.relu()
    x = x.view_as(skips[-1])
    for block in attention.up:
        skip = skips.pop()
        if x.shape != skip.shape:
            times = skip.shape[2] // x.shape[2]
            x = x.repeat_interleave(times, 2).repeat_interleave(times, 3)
        x = go(block, torch.cat([x, skip], 1))
    return attention.to_logits(x)


def literal_loss(model, image, noise):
    """The loss, the masks and the pictures in [-1, 1]."""
    x, (B, K, D) = image, noise.shape
    H, W = model.resolution
    scope, masks = torch.ones_like(x[:, :1]), []
    for k in range(K):
        if k < K - 1:
            alpha = unet(model.attention, torch.cat([x, scope.log()], 1)).sigmoid()
            masks.append(scope * alpha)
            scope = scope * (1 - alpha)
        else:
            masks.append(scope)
    pictures, logits, density, divergence = [], [], 0.0, 0.0
    for k, m in enumerate(masks):
        y = torch.cat([x, m.log()], 1)
        for conv in model.encoder.convs:
            y = conv(y).relu()
        mean, log_deviation = model.encoder.mlp(y.flatten(1)).split(D, 1)
        q = Normal(mean, log_deviation.exp())
        divergence = divergence + kl_divergence(q, Normal(0.0, 1.0)).sum(1)
        z = q.loc + q.scale * noise[:, k]
        y = torch.cat([z[:, :, None, None].expand(-1, -1, H + 8, W + 8), model.decoder.grid.expand(B, -1, -1, -1)], 1)
        for conv in model.decoder.convs:
            y = conv(y).relu()
        y = model.decoder.to_rgba(y)
        p = Normal(y[:, :3], model.sigma_first if k == 0 else model.sigma)
        density = density + m[:, 0] * p.log_prob(x).sum(1).exp()
        pictures.append(y[:, :3] * 2 - 1)
        logits.append(y[:, 3])
    masks = torch.cat(masks, 1)
    by_pixel = kl_divergence(Categorical(masks.movedim(1, -1)), Categorical(logits=torch.stack(logits, -1)))
    loss = -density.log().sum((1, 2)) + model.beta * divergence + model.gamma * by_pixel.sum((1, 2))
    return loss.mean(), masks, torch.stack(pictures, 1)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return MONet((8, 8), latent_size=3, channels=4, blocks=3, num_slots=3).double()


@pytest.fixture
def image():
    return torch.rand(2, 3, 8, 8, dtype=torch.float64)


@pytest.fixture
def noise():
    return torch.randn(2, 3, 3, dtype=torch.float64)


def test_loss_and_gradients_are_those_of_the_paper(model, image, noise):
    model.decoder.grid = torch.stack(torch.meshgrid([torch.linspace(-1, 1, 16).double()] * 2, indexing="ij"))
    scene = model(image, noise=noise)
    expected, masks, pictures = literal_loss(model, image, noise)
    torch.testing.assert_close(scene.loss, expected, rtol=1e-10, atol=0)
    reconstruction, ours = scene.compose()
    torch.testing.assert_close(ours, masks)
    torch.testing.assert_close(ours.sum(1), torch.ones(2, 8, 8, dtype=torch.float64))
    torch.testing.assert_close(scene.decoded[:, :, :3], pictures)
    torch.testing.assert_close(reconstruction, (masks[:, :, None] * pictures).sum(1))
    leaves = dict(model.named_parameters())
    gradients = [torch.autograd.grad(loss, list(leaves.values())) for loss in (scene.loss, expected)]
    for name, a, b in zip(leaves, *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8 * b.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}")


def test_slots_noise_and_objective(model, image, noise):
    one, same, other = (model(image, noise=n) for n in (noise, noise, -noise))
    assert torch.equal(one.decoded, same.decoded)
    assert not torch.equal(one.decoded, other.decoded)
    assert model(image, num_slots=5).decoded.shape == (2, 5, 4, 8, 8)
    torch.manual_seed(5)
    drawn = model(image).slots
    torch.manual_seed(5)
    assert torch.equal(drawn, model(image, noise=torch.randn(2, *model.noise_shape, dtype=torch.float64)).slots)
    loss, masks, error = one.objective(image)
    assert loss is one.loss
    reconstruction, expected = one.compose()
    assert torch.equal(masks, expected)
    torch.testing.assert_close(error, (reconstruction - (image * 2 - 1)).square().mean())


def test_sizes_that_do_not_halve_evenly_and_bfloat16():
    torch.manual_seed(0)
    model = MONet((35, 35), num_slots=4, channels=8)
    image, noise = torch.rand(2, 3, 35, 35), torch.randn(2, 4, 16)
    expected = model(image, noise=noise)
    assert expected.decoded.shape == (2, 4, 4, 35, 35)
    with torch.autocast("cpu", torch.bfloat16):
        scene = model(image, noise=noise)
    loss, masks, _ = scene.objective(image)
    assert loss.dtype == masks.dtype == torch.float32
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 35, 35))
    torch.testing.assert_close(loss, expected.loss, rtol=0.02, atol=0)


def test_it_learns():
    torch.manual_seed(0)
    model = MONet((16, 16), channels=8, blocks=3, num_slots=3)
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-3)
    image = torch.full((4, 3, 16, 16), -1.0)
    image[:, 0, 2:8, 2:8], image[:, 1, 8:14, 7:13] = 1, 1
    noise = torch.randn(4, *model.noise_shape)
    losses = []
    for _ in range(30):
        loss = model(image, noise=noise).loss
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_does_not_fit_is_refused(model, image):
    with pytest.raises(ValueError, match=r"image: expected shape \(B, 3, 8, 8\), got \(2, 1, 8, 8\)"):
        model(image[:, :1])
    with pytest.raises(ValueError, match=r"noise: expected shape \(B, K, 3\)"):
        model(image, noise=torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="num_slots: expected an int >= 1, got 0"):
        model(image, num_slots=0)
    with pytest.raises(ValueError, match="blocks: 5 of them"):
        MONet((31, 64))
