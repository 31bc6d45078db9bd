"""What the experts of a trained run do: which tokens and texts each serves, together with whom, how surely.

Shape suffixes: B windows, S positions, T = B * S tokens, K experts per token, E experts, N texts,
V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moe.config import ConfigError
from moe.dispatch.interface import RouterOutput
from moe.inference.trained_run import TrainedRun
from moe.model.moe_layer import MoELayer
from moe.model.transformer import Transformer

_BATCH = 8  # windows at a time
DROPPABLE = ("topk", "sigmoid", "group_limited", "switch", "noisy_topk")  # rules that a bias can keep off


@dataclass
class LayerRouting:
    """Where the tokens of all texts went in one MoE layer.

    Attributes:
        layer: its number in the model.
        loads: (N, E) int64, assignments of each text.
        by_token: (V, E) int32, assignments by the token's number in the vocabulary.
        together: (E, E) int64, tokens that went to both experts; on the diagonal, to this one.
        tokens: how many were routed.
        top1, margin, entropy: means over tokens: the largest probability, by how much it exceeds the second,
            and the entropy of all in nats.
        kept: share of the assignments that an earlier checkpoint made as well; None without one.
        losses: of experts that were dropped, the loss without each.
    """

    layer: int
    loads: Tensor
    by_token: Tensor
    together: Tensor
    tokens: int = 0
    top1: float = 0.0
    margin: float = 0.0
    entropy: float = 0.0
    kept: float | None = None
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def shares(self) -> Tensor:
        """(E,) fp64, each expert's share of all assignments."""
        loads_E = self.loads.sum(0).double()
        return loads_E / loads_E.sum()

    def favourites(self, expert: int, number: int, at_least: int = 5) -> list[tuple[int, float]]:
        """Tokens that most often go to an expert, with the share that does; rare ones are left out."""
        counts_V, seen_V = self.by_token[:, expert].double(), self.by_token.sum(1)
        # A token that is seen n times makes at most n assignments to one expert.
        choices = self.loads.sum().item() / max(self.tokens, 1)
        share_V = (counts_V * choices / seen_V.clamp(min=1)).where(seen_V >= at_least * choices, -1.0)
        best = share_V.topk(min(number, len(share_V)))
        return [(int(i), float(s)) for s, i in zip(best.values, best.indices, strict=True) if s > 0]


@dataclass
class Routing:
    """All MoE layers of a run, the names of the texts, and the loss on all of them in nats per token."""

    texts: list[str]
    layers: list[LayerRouting]
    loss: float

    def record(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """All figures as plain values for JSON, experts by their number."""
        return {
            "texts": self.texts,
            "tokens": self.layers[0].tokens,
            "loss": self.loss,
            "layers": [
                {
                    "layer": layer.layer,
                    "loads": dict(zip(self.texts, layer.loads.tolist(), strict=True)),
                    "together": layer.together.tolist(),
                    "top1": layer.top1,
                    "margin": layer.margin,
                    "entropy": layer.entropy,
                    "routes_kept": layer.kept,
                    "loss_without": layer.losses,
                    "favourites": [
                        {tokenizer.id_to_token(token): share for token, share in layer.favourites(expert, 10)}
                        for expert in range(layer.loads.shape[1])
                    ],
                }
                for layer in self.layers
            ],
        }


@torch.no_grad()
def routing_statistics(
    run: TrainedRun, texts: Mapping[str, Tensor], earlier: TrainedRun | None = None, drop: int = 0
) -> Routing:
    """Route windows of several texts, and count.

    Args:
        run: from `load_run`.
        texts: by name, (B, S + 1) int64, windows of tokens.
        earlier: the same run at an earlier checkpoint, whose routes are compared.
        drop: for each layer, how many of the least used experts are dropped, one at a time, to see what the
            loss becomes.

    Raises:
        ConfigError: the run is dense, or its rule cannot leave an expert out.
    """
    model, moe = run.model, run.config.moe
    if moe.is_dense:
        raise ConfigError("RUN", "is a dense model, which routes nothing; give a sparse one")
    if drop and (moe.router not in DROPPABLE or moe.top_k == moe.num_experts):
        raise ConfigError("--drop", f"moe.router={moe.router} cannot leave an expert out; use --drop 0")
    layers, nats = _counted(run, texts, earlier)
    tokens = layers[0].tokens
    for layer, module in zip(layers, _moe_layers(model), strict=True):
        for expert in layer.shares.argsort()[:drop].tolist():
            with _without(module, expert):
                lost = sum(_route(model, batch)[1] for _, batch in _batches(texts))
            layer.losses[expert] = lost / tokens
    return Routing(list(texts), layers, nats / tokens)


def _counted(
    run: TrainedRun, texts: Mapping[str, Tensor], earlier: TrainedRun | None
) -> tuple[list[LayerRouting], float]:
    """The layers, and the sum of the cross-entropies."""
    experts, nats = run.config.moe.num_experts, 0.0
    layers = [
        LayerRouting(
            layer,
            torch.zeros(len(texts), experts, dtype=torch.int64),
            torch.zeros(run.config.vocab_size, experts, dtype=torch.int32),
            torch.zeros(experts, experts, dtype=torch.int64),
        )
        for layer in run.config.moe_layers
    ]
    kept = [0] * len(layers)
    for number, batch in _batches(texts):
        routes, lost = _route(run.model, batch)
        nats += lost
        before = None if earlier is None else _route(earlier.model, batch)[0]
        for i, layer in enumerate(layers):
            chosen_TE = _chosen(routes[i], experts)
            _count(layer, number, batch[:, :-1].flatten(), routes[i], chosen_TE)
            if before is not None:
                kept[i] += int((chosen_TE & _chosen(before[i], experts)).sum())
    for layer, same in zip(layers, kept, strict=True):
        layer.top1, layer.margin, layer.entropy = (
            value / layer.tokens for value in (layer.top1, layer.margin, layer.entropy)
        )
        layer.kept = None if earlier is None else same / int(layer.loads.sum())
    return layers, nats


def _batches(texts: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The windows of all texts, some at a time, with the number of their text."""
    for number, windows in enumerate(texts.values()):
        for batch in windows.split(_BATCH):
            yield number, batch


def _count(layer: LayerRouting, text: int, ids_T: Tensor, routing: RouterOutput, chosen_TE: Tensor) -> None:
    """Add the routes of one batch."""
    layer.tokens += len(ids_T)
    layer.loads[text] += chosen_TE.sum(0)
    layer.by_token.index_add_(0, ids_T, chosen_TE.int())
    # Exact, as fp64 holds any number of tokens.
    layer.together += (chosen_TE.double().t() @ chosen_TE.double()).long()
    probs_TE = routing.router_probs.double().cpu()
    best_T2 = probs_TE.topk(2, dim=1).values
    layer.top1 += float(best_T2[:, 0].sum())
    layer.margin += float((best_T2[:, 0] - best_T2[:, 1]).sum())
    layer.entropy += float(torch.special.entr(probs_TE).sum())


def _chosen(routing: RouterOutput, num_experts: int) -> Tensor:
    """(T, E) bool on the CPU: whether a token goes to an expert."""
    indices_TK = routing.expert_indices.cpu()
    chosen = torch.zeros(len(indices_TK), num_experts + 1, dtype=torch.bool)
    return chosen.scatter(1, indices_TK, True)[:, :num_experts]


def _route(model: Transformer, windows: Tensor) -> tuple[list[RouterOutput], float]:
    """What each router returns for windows (B, S + 1), and the sum of their cross-entropies."""
    windows, routes = windows.to(model.embedding.weight.device), list[RouterOutput]()
    hooks = [
        layer.router.register_forward_hook(lambda *call: routes.append(call[2]))
        for layer in _moe_layers(model)
    ]
    try:
        return routes, float(model(windows[:, :-1], targets=windows[:, 1:]).nats)
    finally:
        for hook in hooks:
            hook.remove()


def _moe_layers(model: Transformer) -> list[MoELayer]:
    return [block.ffn for block in model.blocks if isinstance(block.ffn, MoELayer)]


@contextmanager
def _without(layer: MoELayer, expert: int) -> Iterator[None]:
    """Let the router of a layer choose among the other experts."""
    router: Any = layer.router
    bias: Tensor | None = router.expert_bias
    blocked = router.weight.new_zeros(layer.num_experts) if bias is None else bias.clone()
    blocked[expert] = float("-inf")
    router.expert_bias = blocked
    try:
        yield
    finally:
        router.expert_bias = bias
