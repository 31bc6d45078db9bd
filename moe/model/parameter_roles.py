"""What each parameter of a model is for, which decides how it is initialized, decayed and reported."""

from typing import Literal

from torch import nn

from moe.model.experts import GroupedExperts
from moe.model.router import Router

Role = Literal["embedding", "norm", "bias", "router", "experts", "dense"]
_ROLE_OF_MODULE: dict[type[nn.Module], Role] = {
    nn.Embedding: "embedding",
    nn.RMSNorm: "norm",
    GroupedExperts: "experts",
}

Family = Literal["dense", "router", "experts"]  # whose gradient norms are reported


def family(role: Role) -> Family:
    """The family of a role: all but `router` and `experts` is `dense`."""
    return role if role == "router" or role == "experts" else "dense"


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter, by its name.

    Decided by the module that holds it and never by its shape: a stacked norm is 2-D and still a norm.
    `experts` are those that a router chooses among; shared experts and attention are `dense`.
    """
    return {
        f"{prefix}.{name}" if prefix else name: "bias"
        if name.endswith("bias")
        else "router"
        if isinstance(module, Router) or "router" in prefix.split(".")
        else _ROLE_OF_MODULE.get(type(module), "dense")
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
