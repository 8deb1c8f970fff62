"""IODINE is the paper's: layers, inputs of the refinement, loss and where its gradients stop; and it learns."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from models.iodine import IODINE, Refinement


def shapes(module):
    return {name: tuple(p.shape) for name, p in module.named_parameters() if not name.startswith("refinement.norm")}


def convolutions(name, widths, k):
    layers = enumerate(pairwise(widths))
    return {f"{name}.{i}.{p}": s for i, (a, b) in layers for p, s in (("weight", (b, a, k, k)), ("bias", (b,)))}


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def test_tetrominoes_layers_are_the_published_ones():
    model = IODINE(**IODINE.configurations["tetrominoes"])
    assert shapes(model) == {
        "initial": (64,),
        **convolutions("decoder.convs", [32 + 2, 32, 32, 32, 32, 4], 5),
        # 17 maps; 128 of the MLP, lambda and its gradient, 64 each; no LSTM.
        **convolutions("refinement.convs", [17, 32, 32, 32], 5),
        **linear("refinement.mlp.0", 32, 128),
        **linear("refinement.head", 128 + 64 + 64, 64),
    }
    # 64; 27,232 + 3 x 25,632 + 3,204; 13,632 + 2 x 25,632; 4,224; 16,448; norms of 3, 1, 1, 1 channels and 64 numbers.
    assert sum(p.numel() for p in model.parameters()) == 64 + 107_332 + 64_896 + 4_224 + 16_448 + 2 * 70
    assert (model.sigma, model.noise_shape) == (0.1, (5, 4, 32))
    assert all(conv.stride == (1, 1) for conv in model.refinement.convs)


def test_multi_dsprites_has_an_lstm():
    model = IODINE(**IODINE.configurations["multi-dsprites"])
    assert shapes(model) == {
        "initial": (32,),
        **convolutions("decoder.convs", [16 + 2, 32, 32, 32, 32, 4], 5),
        **convolutions("refinement.convs", [17, 32, 32, 32], 5),
        **linear("refinement.mlp.0", 32, 128),
        **{f"refinement.lstm.weight_{n}": (4 * 128, w) for n, w in (("ih", 128 + 32 + 32), ("hh", 128))},
        **{f"refinement.lstm.bias_{n}": (4 * 128,) for n in ("ih", "hh")},
        **linear("refinement.head", 128, 32),
    }
    assert (model.resolution, model.noise_shape) == ((64, 64), (5, 6, 16))
    assert all(conv.stride == (1, 1) for conv in model.refinement.convs)


def test_clevr_layers_are_the_published_ones():
    model = IODINE(**IODINE.configurations["clevr6"])
    assert shapes(model) == {
        "initial": (128,),
        **convolutions("decoder.convs", [64 + 2, 64, 64, 64, 64, 4], 3),
        **convolutions("refinement.convs", [17, 64, 64, 64, 64], 3),
        **linear("refinement.mlp.0", 64, 256),
        **{f"refinement.lstm.weight_{n}": (4 * 256, w) for n, w in (("ih", 256 + 128 + 128), ("hh", 256))},
        **{f"refinement.lstm.bias_{n}": (4 * 256,) for n in ("ih", "hh")},
        **linear("refinement.head", 256, 128),
    }
    assert (model.resolution, model.noise_shape) == ((128, 128), (5, 7, 64))
    assert all(conv.stride == (2, 2) for conv in model.refinement.convs)


@pytest.mark.parametrize("name", IODINE.program)
def test_the_program_differs_from_the_text(name):
    text, program = (IODINE(**each[name]) for each in (IODINE.configurations, IODINE.program))
    assert all(conv.stride == (2, 2) for conv in program.refinement.convs)
    assert (text.noise_shape[0], program.noise_shape[0]) == (5, 6)
    second = linear("refinement.mlp.2", 256, 256) if name == "clevr6" else {}
    assert shapes(program) == shapes(text) | second


def test_defaults_are_those_of_the_program():
    """Weights and calls of earlier versions mean what they meant."""
    default, program = IODINE(), IODINE(**IODINE.program["tetrominoes"])
    assert shapes(default) == shapes(program)
    assert default.noise_shape == program.noise_shape
    assert default.refinement.convs[0].stride == (2, 2)


def test_a_narrower_decoder_leaves_the_refinement_as_it_is():
    model = IODINE(channels=16, kernel_size=3, refinement_channels=32, refinement_kernel_size=5)
    assert {n: s for n, s in shapes(model).items() if n.startswith("refinement")} == {
        n: s for n, s in shapes(IODINE()).items() if n.startswith("refinement")
    }
    assert [conv.weight.shape for conv in model.decoder.convs][1:4] == [(16, 16, 3, 3)] * 3


# The paper, word for word: no kernels, nothing taken apart, each slot by itself.


def decode(model, z):
    """The pictures (B, K, 3, H, W) and mask logits (B, K, H, W) of latents (B, K, D)."""
    (H, W), (B, K, D) = model.resolution, z.shape
    rows, columns = torch.linspace(-1, 1, H, dtype=z.dtype), torch.linspace(-1, 1, W, dtype=z.dtype)
    grid = torch.stack([rows[:, None].expand(H, W), columns.expand(H, W)])
    x = torch.cat([z.view(B * K, D, 1, 1).expand(-1, -1, H, W), grid.expand(B * K, -1, -1, -1)], 1)
    *hidden, last = model.decoder.convs
    for conv in hidden:
        x = F.elu(conv(x))
    out = last(x).view(B, K, 4, H, W)
    return out[:, :, :3], out[:, :, 3]


def log_mixture(x, means, logits, sigma):
    """log sum_k softmax(logits)_k N(x; mu_k, sigma^2), (B, H, W)."""
    log_p = Normal(means, sigma).log_prob(x[:, None]).sum(2)
    return torch.log((logits.softmax(1) * log_p.exp()).sum(1))


def normalised(norm, x):
    """Every slot's map over its pixels and channels (or numbers), with gain and offset for each channel (number)."""
    flat = x.flatten(2)
    y = (flat - flat.mean(2, keepdim=True)) / (flat.var(2, correction=0, keepdim=True) + norm.eps).sqrt()
    by_channel = (-1, *[1] * (x.dim() - 3))
    return y.view_as(x) * norm.weight.view(by_channel) + norm.bias.view(by_channel)


def refine(model, x, z_parameters, means, logits, loss, state, stop=True):
    net, K = model.refinement, means.shape[1]
    d_means, d_logits, d_lambda = torch.autograd.grad(
        loss, [means, logits, z_parameters], retain_graph=True, create_graph=not stop
    )
    log_p = Normal(means, model.sigma).log_prob(x[:, None]).sum(2)
    likelihood = log_mixture(x, means, logits, model.sigma)[:, None].expand(-1, K, -1, -1)
    others = [[j for j in range(K) if j != k] for k in range(K)]
    leave_one_out = torch.stack([log_mixture(x, means[:, o], logits[:, o], model.sigma) for o in others], 1)
    if stop:
        likelihood, leave_one_out = likelihood.detach(), leave_one_out.detach()
    maps = [
        means,
        logits[:, :, None],
        logits.softmax(1)[:, :, None],
        (log_p.exp() / log_p.exp().sum(1, keepdim=True))[:, :, None],
        normalised(net.norm_d_means, d_means),
        normalised(net.norm_d_logits, d_logits[:, :, None]),
        normalised(net.norm_leave_one_out, leave_one_out[:, :, None]),
        normalised(net.norm_likelihood, likelihood[:, :, None]),
        x[:, None].expand(-1, K, -1, -1, -1),
        net.grid.expand(len(x), K, -1, -1, -1),
    ]
    y = torch.cat(maps, 2)
    assert y.shape[2] == Refinement.MAPS == 17
    y = y.flatten(0, 1)
    for conv in net.convs:
        y = F.elu(F.conv2d(y, conv.weight, conv.bias, stride=conv.stride, padding=conv.kernel_size[0] // 2))
    y = y.mean((2, 3))
    for i in range(0, len(net.mlp), 2):
        y = F.elu(net.mlp[i](y))
    y = torch.cat([y.view(*z_parameters.shape[:2], -1), z_parameters, normalised(net.norm_d_posterior, d_lambda)], 2)
    if net.lstm is not None:
        state = net.lstm(y.flatten(0, 1), state)
        y = state[0].view(*y.shape[:2], -1)
    return z_parameters + net.head(y), state


def literal_loss(model, image, noise, stop=True):
    """sum_t (t / T) L_t, and the last pictures and mask logits: t = 1..T as printed, 0..T as programmed."""
    x = image
    B, n, K, D = noise.shape
    counted = range(1, n + 1) if model.weigh_first else range(n)
    z_parameters, state, total = model.initial.expand(B, K, 2 * D), None, 0.0
    for i, t in enumerate(counted):
        q = Normal(z_parameters[:, :, :D], torch.log1p(z_parameters[:, :, D:].exp()).sqrt())
        means, logits = decode(model, q.loc + q.scale * noise[:, i])
        divergence = kl_divergence(q, Normal(0.0, 1.0)).sum((1, 2))
        L = divergence - log_mixture(x, means, logits, model.sigma).sum((1, 2))
        total = total + t / counted[-1] * L.mean()
        if t < counted[-1]:
            z_parameters, state = refine(model, x, z_parameters, means, logits, L.sum(), state, stop)
    return total, means * 2 - 1, logits


def tiny(lstm_size=None, **options):
    """A model in float64, the norms' gains and offsets not 1 and 0, the coordinates exact in any precision."""
    torch.manual_seed(3)
    sizes = dict(latent_size=3, channels=4, kernel_size=3, refinement_layers=2, mlp_sizes=(5,), lstm_size=lstm_size)
    model = IODINE((9, 5), **sizes, **dict(num_slots=3, iterations=2) | options).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".norm_" in name:
                p += 0.3 * torch.randn_like(p)
    return model


@pytest.fixture
def image():
    return torch.rand(2, 3, 9, 5, dtype=torch.float64)


@pytest.fixture
def noise():
    return torch.randn(2, 3, 3, 3, dtype=torch.float64)


@pytest.mark.parametrize("lstm_size", [None, 6])
def test_loss_and_gradients_are_those_of_the_paper(lstm_size, image, noise):
    model = tiny(lstm_size)
    scene = model(image, noise=noise)
    expected, means, logits = literal_loss(model, image, noise)
    torch.testing.assert_close(scene.loss, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(scene.decoded, torch.cat([means, logits[:, :, None]], 2), rtol=1e-9, atol=1e-10)
    leaves = dict(model.named_parameters())
    ours, theirs = (torch.autograd.grad(loss, list(leaves.values())) for loss in (scene.loss, expected))
    for name, a, b in zip(leaves, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * b.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}")
    # That comparison notices: where nothing stops, the decoder's gradient is another.
    flowing, *_ = literal_loss(model, image, noise, stop=False)
    weight = model.decoder.convs[1].weight
    (other,) = torch.autograd.grad(flowing, weight)
    torch.testing.assert_close(flowing, expected)
    assert (other - theirs[list(leaves).index("decoder.convs.1.weight")]).norm() > 1e-3 * other.norm()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_printed_every_loss_counts(count, image, noise):
    """T losses weighted 1 / T to 1, of which the first is the initial posterior's, and stride 1."""
    model = tiny(6, weigh_first=True, refinement_stride=1)
    scene = model(image, noise=noise[:, :count])
    expected, means, logits = literal_loss(model, image, noise[:, :count])
    torch.testing.assert_close(scene.loss, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(scene.decoded, torch.cat([means, logits[:, :, None]], 2), rtol=1e-9, atol=1e-10)
    ours, theirs = (torch.autograd.grad(loss, list(model.decoder.parameters())) for loss in (scene.loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * b.abs().max().item())
    frames = image.unsqueeze(1).repeat(1, count, 1, 1, 1)
    assert torch.equal(model(frames, noise=noise[:, :count]).loss, scene.loss)
    assert model(frames).slots.shape == model(image, iterations=count).slots.shape
    with pytest.raises(ValueError, match=f"image: expected {count} frames for {count} iterations"):
        model(frames[:, :1].repeat(1, count + 1, 1, 1, 1), iterations=count)


def test_what_the_refinement_sees_of_gradients_and_likelihoods_carries_no_gradient(image, noise):
    model = tiny()
    seen = {}
    for name, module in model.refinement.named_children():
        if name.startswith("norm"):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, inputs[0]))
    model(image, noise=noise)
    assert len(seen) == 5
    assert not any(x.requires_grad for x in seen.values())


def test_scoring_builds_no_graph_and_gives_the_same(image, noise):
    model = tiny(6)
    trained = model(image, noise=noise)
    with torch.no_grad():
        scored = model(image, noise=noise)
    model.requires_grad_(False)
    frozen = model(image, noise=noise)
    assert trained.attention is None
    for a, b, c in ([getattr(x, name) for x in (trained, scored, frozen)] for name in ("decoded", "slots", "loss")):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert a.requires_grad
        assert not b.requires_grad


def test_what_a_scene_is_made_of(image, noise):
    model = tiny()
    scene = model(image, noise=noise)
    assert scene.decoded.shape == (2, 3, 4, 9, 5)
    assert scene.slots.shape == (2, 3, 6)
    reconstruction, masks = scene.compose()
    torch.testing.assert_close(masks, scene.decoded[:, :, 3].softmax(1))
    torch.testing.assert_close(reconstruction, (masks[:, :, None] * scene.decoded[:, :, :3]).sum(1))
    loss, same, error = scene.objective(image)
    assert loss is scene.loss
    assert torch.equal(masks, same)
    torch.testing.assert_close(error, (reconstruction - (image * 2 - 1)).square().mean())
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_slots_and_iterations_per_call(image):
    model = tiny()
    assert model(image).decoded.shape[1] == 3
    assert model(image, num_slots=5, iterations=1).decoded.shape[1] == 5
    noise = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    longer, shorter = model(image, noise=noise), model(image, noise=noise[:, :3])
    expected, *_ = literal_loss(model, image, noise)
    torch.testing.assert_close(longer.loss, expected)
    assert not torch.equal(longer.slots, shorter.slots)


def test_latents_are_drawn_by_the_noise(image, noise):
    model = tiny()
    assert (2, *model.noise_shape) == tuple(noise.shape)
    one, same, other = (model(image, noise=n).decoded for n in (noise, noise, -noise))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.manual_seed(5)
    drawn = model(image).decoded
    torch.manual_seed(5)
    assert torch.equal(drawn, model(image, noise=torch.randn(2, *model.noise_shape, dtype=torch.float64)).decoded)


def test_slots_are_exchangeable(image, noise):
    model, order = tiny(6), torch.tensor([2, 0, 1])
    scene, permuted = model(image, noise=noise), model(image, noise=noise[:, :, order])
    torch.testing.assert_close(permuted.decoded, scene.decoded[:, order])
    torch.testing.assert_close(permuted.loss, scene.loss)


def test_an_image_does_not_see_the_others_of_its_batch(image, noise):
    model = tiny()
    torch.testing.assert_close(model(image[1:], noise=noise[1:]).decoded, model(image, noise=noise).decoded[1:])


def test_sequences_take_a_frame_an_iteration(image, noise):
    model = tiny(6)
    still = model(image, noise=noise)
    frames = image.unsqueeze(1).repeat(1, 3, 1, 1, 1)
    same = model(frames, noise=noise)
    assert torch.equal(same.decoded, still.decoded)
    assert torch.equal(same.loss, still.loss)
    # The last frame is predicted: it is in the loss and the error, but has improved nothing.
    frames[:, 2] = -image
    predicted = model(frames, noise=noise)
    assert torch.equal(predicted.decoded, still.decoded)
    assert not torch.equal(predicted.loss, still.loss)
    assert torch.equal(predicted.objective(frames)[2], still.objective(-image)[2])
    frames[:, 1] = 1 - image
    assert not torch.equal(model(frames, noise=noise).decoded, still.decoded)
    assert model(frames[:, :2]).decoded.shape == still.decoded.shape


def test_bfloat16_autocast_keeps_loss_and_masks_in_float32():
    torch.manual_seed(0)
    model = IODINE((12, 12), channels=8, kernel_size=3, iterations=2)
    image, noise = torch.rand(2, 3, 12, 12), torch.randn(2, *model.noise_shape)
    expected = model(image, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        scene = model(image, noise=noise)
    loss, masks, error = scene.objective(image)
    assert {x.dtype for x in (loss, masks, error, scene.slots)} == {torch.float32}
    torch.testing.assert_close(loss, expected.loss, rtol=0.02, atol=0)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_it_learns():
    torch.manual_seed(0)
    model = IODINE((12, 12), channels=8, kernel_size=3, latent_size=8, iterations=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    image = torch.full((4, 3, 12, 12), -1.0)
    image[:, 0, 2:7, 2:7], image[:, 1, 6:11, 5:10] = 1, 1
    noise = torch.randn(4, *model.noise_shape)
    losses = []
    for _ in range(20):
        loss = model(image, noise=noise).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x[:, :1]), r"image: expected shape \(B, 3, 9, 5\) or .*, got \(2, 1, 9, 5\)"),
        (lambda m, x: m(x, iterations=0), "iterations: expected an int >= 1, got 0"),
        (lambda m, x: m(x, num_slots=1), "num_slots: expected an int >= 2, got 1"),
        (lambda m, x: m(x, noise=torch.zeros(2, 3, 3, 4)), r"noise: .* D = 3, .* got \(2, 3, 3, 4\)"),
        (lambda m, x: m(x.unsqueeze(1), iterations=2), "image: expected 3 frames for 2 iterations"),
    ],
)
def test_what_does_not_fit_is_refused(call, message, image):
    with pytest.raises(ValueError, match=message):
        call(tiny(), image)
