"""Balance of the experts over the global batch: how often each is chosen, and the biases that follow it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.config import MoEConfig
from moe.data.batches import Batch
from moe.model.moe_layer import MoELayer
from moe.model.transformer import Transformer, TransformerOutput
from moe.training.engine import Engine


class GlobalCounts:
    """`tokens_per_expert` of the global batch, for `moe.aux_loss_scope=global_batch`.

    The loss of the first micro batch already depends on it. So several micro batches pass the model once
    more before, without gradients; a single one needs no more than a sum over the ranks.

    Args:
        engine: of the run. All ranks make this together.
        batches: this rank's micro batches of a step.
        moe: the section `moe`.
    """

    def __init__(self, engine: Engine, batches: Sequence[Batch], moe: MoEConfig):
        self._engine, self._counts_LE = engine, None
        self._wanted = moe.aux_loss_scope == "global_batch" and not moe.is_dense
        if self._wanted and len(batches) > 1:
            self._counts_LE = engine.sum_over_ranks(_count(engine.module, batches))

    def of(self, output: TransformerOutput) -> Tensor | None:
        """The counts (MoE layers, E) int64, for the output of any of the batches; None for other scopes."""
        if self._wanted and self._counts_LE is None:
            assert output.aux is not None
            self._counts_LE = self._engine.sum_over_ranks(output.aux.tokens_per_expert.clone())
        return self._counts_LE


@torch.no_grad()
def update_expert_biases(model: Transformer, tokens_per_expert: Tensor, rate: float) -> Tensor:
    """Lower the bias of each expert with more than the mean load by `rate`, and raise the others'.

    After Wang et al. 2024 (Auxiliary-loss-free load balancing), algorithm 1. Then their mean is subtracted,
    which changes no choice.

    Args:
        model: whose routers have an `expert_bias`.
        tokens_per_expert: (MoE layers, E) int64 of the global batch.
        rate: `moe.bias_update_rate`.

    Returns:
        (MoE layers,) fp32, the difference between the largest and the smallest bias.
    """
    ranges: list[Tensor] = []
    layers = [block.ffn for block in model.blocks if isinstance(block.ffn, MoELayer)]
    for layer, counts_E in zip(layers, tokens_per_expert, strict=True):
        too_few_E = counts_E.sum() - len(counts_E) * counts_E  # an integer, so 0 is exact
        bias_E = layer.router.expert_bias
        bias_E += rate * too_few_E.sign()
        bias_E -= bias_E.mean()
        ranges.append(bias_E.amax() - bias_E.amin())
    return torch.stack(ranges)


@torch.no_grad()
def _count(model: Transformer, batches: Sequence[Batch]) -> Tensor:
    outputs = (
        model(batch.tokens, batch.documents, dropout_keys=batch.dropout_keys, targets=batch.targets).aux
        for batch in batches
    )
    return torch.stack([aux.tokens_per_expert for aux in outputs]).sum(0)
