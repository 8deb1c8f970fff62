"""`convert_weights` knows the names of the field: layouts of state dicts of public repositories, there and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iio_kernels.nn import SlotAttention, convert_weights

#: Widths of inputs, slots, and the MLP; how many slots.
X, D, H, K = 10, 8, 12, 3

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""By the name of a parameter: whose place it has in `SlotAttention`, and its shape."""


def layout(
    norms: str,
    projections: str,
    mlp: str,
    *,
    gru: str = "gru",
    bias: bool = False,
    mlp_bias: bool = True,
    **initial: str,
) -> Layout:
    """A module's parameters: the normalisations of inputs, slots and before the MLP, queries, keys and values, the MLP.

    `initial`: the place of initial slots, or "sigma" or "log_var", and their name and shape.
    """
    found: Layout = {}
    for name, ours, width in zip(norms.split(), ("norm_inputs", "norm_slots", "norm_mlp"), (X, D, D), strict=True):
        found |= {f"{name}.{p}": (f"{ours}.{p}", (width,)) for p in ("weight", "bias")}
    for name, ours, width in zip(projections.split(), ("to_q", "to_k", "to_v"), (D, X, X), strict=True):
        found |= {f"{name}.weight": (f"{ours}.weight", (D, width))}
        found |= {f"{name}.bias": (f"{ours}.bias", (D,))} if bias else {}
    for name, ours, shape in zip(mlp.split(), ("mlp.0", "mlp.2"), ((H, D), (D, H)), strict=True):
        found |= {f"{name}.weight": (f"{ours}.weight", shape)}
        found |= {f"{name}.bias": (f"{ours}.bias", shape[:1])} if mlp_bias or ours == "mlp.2" else {}
    for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        found[f"{gru}.{p}"] = f"gru.{p}", (3 * D, D)[: 2 if p.startswith("weight") else 1]
    for ours, (name, *shape) in ((ours, named.split()) for ours, named in initial.items()):
        found[name] = ours, tuple({"D": D, "K": K}.get(n) or int(n) for n in shape)
    return found


PROJECT, TO, PROJ = (f"{name}_q {name}_k {name}_v" for name in ("project", "to", "proj"))
INPUT, INPUTS = "norm_input norm_slots norm_pre_ff", "norm_inputs norm_slots norm_mlp"
GAUSSIAN = {"mu": "slots_mu 1 1 D", "log_sigma": "slots_log_sigma 1 1 D"}
GAUSSIAN_ = {"mu": "slots_mu 1 1 D", "log_sigma": "slots_logsigma 1 1 D"}
SLOT_GAUSSIAN = {"mu": "slot_mu 1 1 D", "log_sigma": "slot_log_sigma 1 1 D"}
SIGMA = {"mu": "slots_mu 1 1 D", "sigma": "slots_sigma 1 1 D"}

LAYOUTS: dict[str, Layout] = {
    "lucidrains/slot-attention": layout(INPUT, TO, "mlp.0 mlp.2", bias=True, **GAUSSIAN_),
    "evelinehong/slot-attention-pytorch": layout(INPUT, TO, "fc1 fc2", bias=True, **SIGMA),
    "imbue-ai/slot_attention": layout(INPUTS, PROJECT, "mlp.0 mlp.2", **GAUSSIAN),
    "SRXie/OFR": layout(INPUTS, PROJECT, "mlp.0 mlp.2", **GAUSSIAN),
    "davzha/MESH": layout(INPUTS, PROJECT, "mlp.0 mlp.2", **GAUSSIAN),
    "Michedev/slot-attention-pytorch": layout(INPUT, TO, "mlp.0 mlp.2", **GAUSSIAN),
    "addtt/object-centric-library": layout(INPUT, TO, "mlp.0 mlp.2", **GAUSSIAN),
    "guanyilin428/OCCI": layout(INPUT, TO, "mlp.0 mlp.2", bias=True, **GAUSSIAN),
    "karazijal/clevrtex": layout(INPUT, TO, "mlp.0 mlp.2", bias=True, **GAUSSIAN_),
    "brendel-group/objects-compositional-generalization": layout(INPUT, TO, "fc1 fc2", bias=True, **GAUSSIAN),
    "riccardomajellaro/disentangled-slot-attention": layout(INPUT, TO, "fc1 fc2", bias=True, **GAUSSIAN_),
    "IuliaDuta/SPHINX": layout(INPUT, TO, "mlp.0 mlp.2", mu="slots_mu 1 D", log_sigma="slots_logsigma 1 D"),
    "yycho0108/SlotAttention": layout(
        "norm_in norm_slots norm_pre_ff", TO, "mlp.0 mlp.2", bias=True, mu="slots_mu 1 1 D",
        log_sigma="slots_log_std 1 1 D"),
    "singhgautam/slate": layout(INPUTS, PROJECT, "mlp.0 mlp.2"),
    "singhgautam/steve": layout(INPUTS, PROJECT, "mlp.0 mlp.2", **SLOT_GAUSSIAN),
    "jha-lab/neural-slot-interpreters": layout(INPUTS, PROJECT, "mlp.0 mlp.2"),
    "JindongJiang/latent-slot-diffusion": layout(INPUTS, PROJECT, "mlp.0 mlp.2", **SLOT_GAUSSIAN),
    "pairlab/SlotFormer": layout("norm_inputs project_q.0 mlp.0", "project_q.1 project_k project_v", "mlp.1 mlp.3"),
    "Wuziyi616/SlotDiffusion": layout(
        "slot_attention.norm_inputs slot_attention.project_q.0 slot_attention.mlp.0",
        "slot_attention.project_q.1 slot_attention.project_k slot_attention.project_v",
        "slot_attention.mlp.1 slot_attention.mlp.3", gru="slot_attention.gru", mu="init_latents 1 K D"),
    "amazon-science/object-centric-learning-framework": layout(
        "norm_input norm_slots ff_mlp.module.0", TO, "ff_mlp.module.1 ff_mlp.module.3"),
    "amazon-science/AdaSlot": layout("norm_input norm_slots ff_mlp.0", TO, "ff_mlp.1 ff_mlp.3"),
    "martius-lab/videosaur": layout("norm_features norm_slots mlp.layers.0", TO, "mlp.layers.1 mlp.layers.3"),
    "martius-lab/slotcontrast": layout("norm_features norm_slots mlp.layers.0", TO, "mlp.layers.1 mlp.layers.3"),
    "stelzner/osrt": layout(
        "norm_input norm_slots norm_pre_mlp", TO, "mlp.0 mlp.2", mu="initial_slots K D"),
    "YuLiu-LY/BO-QSA": layout(
        "norm_feature norm_slots norm_mlp", PROJECT, "mlp.0 mlp.2", mu="slots_init.weight K D"),
    "gkakogeorgiou/spot": layout(INPUTS, PROJECT, "mlp.0 mlp.2", mu="slots_init.weight K D"),
    "AIS-Bonn/OCVP-object-centric-video-prediction": layout(
        "norm_input norm_slot norm_mlp", TO, "mlp.0 mlp.2", bias=True),
    "norm_slot and proj_q": layout("norm_input norm_slot norm_mlp", PROJ, "mlp.0 mlp.2", **SLOT_GAUSSIAN),
    "norm_slot and slots": layout("norm_input norm_slot norm_mlp", TO, "mlp.0 mlp.2", bias=True, mu="slots 1 K D"),
    "miltonllera/pytorch-object-centric": layout(
        "norm_input norm_slot norm_res", "q_proj k_proj v_proj", "mlp.0 mlp.2", mlp_bias=False, mu="slot_mu 1 1 D",
        log_var="slot_logvar 1 1 D"),
    "liaoweiduo/CODA-Prompt": layout(
        "ln_input ln_slot ln_output", "q k v", "mlp.0 mlp.2", mu="mu 1 1 D", log_sigma="log_sigma 1 1 D"),
    "sabrikhalil/DINOSAUR": layout(INPUT, PROJECT, "mlp.0 mlp.2", bias=True, **SIGMA),
    "mausset/semantic_decomposition": layout(
        INPUT, "inv_cross_q inv_cross_k inv_cross_v", "mlp.0 mlp.2", mu="init_mu D", log_sigma="init_log_sigma D"),
    "Fsoft-AIC/UNO": layout(INPUT, PROJECT, "mlp.0 mlp.2", bias=True, mu="slots_embedding.weight K D"),
    "bcreganprogs/semi_supervised_uncertainty": layout(
        "layer_norm_inputs layer_norm_slots layer_norm_pre_ff", "to_queries to_keys to_values", "mlp.0 mlp.2",
        **GAUSSIAN_),
    "Genera1Z/VQ-VFM-OCL": layout("norm1kv norm1q norm2", PROJ, "ffn.0 ffn.3", gru="rnn"),
}  # fmt: skip


def weights_of(layout: Layout) -> dict[str, Tensor]:
    """Random ones, positive because of deviations."""
    torch.manual_seed(0)
    return {name: torch.rand(shape) + 0.1 for name, (_, shape) in layout.items()}


def ours_for(layout: Layout) -> SlotAttention:
    places = {place for place, _ in layout.values()}
    spread = places & {"sigma", "log_var", "log_sigma"}
    initial = ("gaussian" if spread else "queries") if "mu" in places else "given"
    return SlotAttention(X, D, num_slots=K, mlp_size=H, bias="to_q.bias" in places, initial=initial)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_field(name: str):
    """Each parameter finds its own place, and its way back, to the bit."""
    theirs, ours = weights_of(LAYOUTS[name]), ours_for(LAYOUTS[name])
    converted = convert_weights(theirs, ours.state_dict())
    ours.load_state_dict(converted)
    for key, (place, shape) in LAYOUTS[name].items():
        if place == "sigma":
            torch.testing.assert_close(converted["log_sigma"].exp().view(shape), theirs[key])
        elif place == "log_var":
            torch.testing.assert_close(converted["log_sigma"].mul(2).view(shape), theirs[key])
        else:
            assert torch.equal(converted[place].view(shape), theirs[key]), key
    back = convert_weights(ours.state_dict(), theirs)
    assert list(back) == list(theirs)
    for key, (place, _) in LAYOUTS[name].items():
        if place == "sigma":
            torch.testing.assert_close(back[key], theirs[key])
        else:
            assert torch.equal(back[key], theirs[key]), key


def test_a_spread_is_the_same_in_all_forms():
    """A deviation, its logarithm and that of its square, of modules of the field among themselves."""
    names = ("evelinehong/slot-attention-pytorch", "riccardomajellaro/disentangled-slot-attention")
    sigma, log_sigma = (weights_of(LAYOUTS[name]) for name in names)
    log_var = {name.replace("slots_logsigma", "slots_logvar"): x for name, x in log_sigma.items()}
    made = convert_weights(log_var, sigma)
    torch.testing.assert_close(made["slots_sigma"], (log_var["slots_logvar"] / 2).exp())
    torch.testing.assert_close(convert_weights(made, log_var)["slots_logvar"], log_var["slots_logvar"])
    assert torch.equal(convert_weights(log_var, log_sigma)["slots_logsigma"], log_var["slots_logvar"] / 2)


def test_a_bias_that_an_mlp_has_not_is_zero():
    """Nothing else is left out, and nothing but zeros."""
    theirs, ours = weights_of(LAYOUTS["miltonllera/pytorch-object-centric"]), ours_for(LAYOUTS["singhgautam/steve"])
    converted = convert_weights(theirs, ours.state_dict())
    assert not converted["mlp.0.bias"].any()
    assert convert_weights(converted, theirs).keys() == theirs.keys()
    converted["mlp.0.bias"] = torch.ones(H)
    with pytest.raises(ValueError, match=r"got mlp.0.bias beyond it"):
        convert_weights(converted, theirs)


OTHERS = {
    # Both the Gaussian, which its forward does not use, and learnt queries.
    "JackBrady/interaction-asymmetry": LAYOUTS["brendel-group/objects-compositional-generalization"]
    | {"query_pos": ("", (1, K, D))},
    # Keys and values pass through another network.
    "gorkaydemir/DINOSAUR": {"Q.weight": ("", (D, D)), "f.0.weight": ("", (D, D))},
    # Projections are bare matrices, from the right.
    "Kuan-002/dinosaur": {"norm_inputs.weight": ("", (X,)), "W_q": ("", (D, D))},
    # A second set of everything, for the background.
    "KovenYu/uORF": LAYOUTS["lucidrains/slot-attention"] | {"slots_mu_bg": ("", (1, 1, D))},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_refused(name: str):
    with pytest.raises(ValueError, match="expected the parameters of a Slot Attention module, got"):
        convert_weights(weights_of(OTHERS[name]), SlotAttention(X, D, mlp_size=H).state_dict())
