"""What each parameter is for."""

import torch
from torch import nn

from moe.model.experts import GroupedExperts
from moe.model.parameter_roles import parameter_roles
from tests.support.models import make_model


def test_every_parameter_of_a_model_with_all_features_has_the_role_of_its_name():
    """By name, where the library goes by module."""
    model = make_model(
        model={"qk_norm": True, "tie_embeddings": False},
        moe={"num_shared_experts": 1, "first_dense_layers": 1},
    )
    roles = parameter_roles(model)
    assert roles.keys() == dict(model.named_parameters()).keys()
    for name, role in roles.items():
        if "norm" in name:
            assert role == "norm", name
        elif name.startswith("embedding."):
            assert role == "embedding", name
        elif ".router." in name:
            assert role == "router", name
        elif ".experts." in name:
            assert role == "experts", name
        else:
            assert role == "dense", name
    assert {"norm", "embedding", "router", "experts", "dense"} == set(roles.values())
    for name in ("head.weight", "blocks.0.ffn.w_up", "blocks.1.ffn.shared_experts.w_up"):
        assert roles[name] == "dense"


def test_a_tied_embedding_is_one_parameter_and_an_embedding():
    roles = parameter_roles(make_model())
    assert roles["embedding.weight"] == "embedding"
    assert not any(name.startswith("head") for name in roles)


def test_the_shape_of_a_parameter_says_nothing_about_its_role():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = GroupedExperts(2, range(2), 8, 8, None)
            self.norm = nn.RMSNorm([4, 8])  # 2-D, as a stacked one
            self.linear = nn.Linear(8, 8)
            self.matrix = nn.Parameter(torch.zeros(8, 8))

    assert parameter_roles(Odd()) == {
        "matrix": "dense",
        "experts.w_gate": "experts",
        "experts.w_up": "experts",
        "experts.w_down": "experts",
        "norm.weight": "norm",
        "linear.weight": "dense",
        "linear.bias": "bias",
    }


def test_a_part_of_a_model_has_the_roles_of_the_whole():
    model = make_model(moe={"num_shared_experts": 1})
    whole = parameter_roles(model)
    for name, role in parameter_roles(model.blocks[1]).items():
        assert whole[f"blocks.1.{name}"] == role
