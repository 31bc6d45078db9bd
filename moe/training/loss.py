"""The training loss: cross-entropy plus the auxiliary losses of the MoE layers."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from moe.config import MoEConfig, check_type
from moe.model.losses import NOT_COUNTED, check_targets, load_balancing_loss_of_counts, not_in_vocabulary
from moe.model.moe_layer import MoEAux
from moe.model.transformer import TransformerOutput


class TrainingLoss(NamedTuple):
    """The loss of one micro batch."""

    total: Tensor  # () what is differentiated
    lm: Tensor  # () its cross-entropy, nats per token
    aux: MoEAux | None  # what the MoE layers report, its losses as used here; None in a dense model


def training_loss(
    output: TransformerOutput, targets: Tensor, moe: MoEConfig, global_counts: Tensor | None = None
) -> TrainingLoss:
    """`lm + aux_loss_coef * load_balancing_loss + z_loss_coef * router_z_loss`, both means over MoE layers.

    Args:
        output: of the model, with these targets or with logits.
        targets: (B, S) int64, the token after each position; -100: not counted, in the mean either.
        moe: the section `moe`, for its two coefficients and `aux_loss_scope`.
        global_counts: (MoE layers, E) int64, `tokens_per_expert` of the global batch, for that scope. None:
            this is the global batch.

    Raises:
        ValueError: the targets have another shape than the logits or, on a CPU, are not in the vocabulary; or
            an argument has another type.
    """
    check_type("output", output, TransformerOutput)
    check_type("moe", moe, MoEConfig)
    check_targets(targets, targets.shape if output.logits is None else output.logits.shape[:2])
    if output.logits is not None:
        try:
            lm = F.cross_entropy(output.logits.float().flatten(0, 1), targets.flatten())
        except IndexError:
            raise not_in_vocabulary(targets, output.logits.shape[2]) from None
    else:
        assert output.nats is not None
        lm = output.nats / (targets != NOT_COUNTED).sum()
    if (aux := output.aux) is None:
        return TrainingLoss(lm, lm, None)
    if moe.aux_loss_scope != "sequence":
        counts = aux.tokens_per_expert
        if moe.aux_loss_scope == "global_batch" and global_counts is not None:
            counts = global_counts
        aux = aux._replace(load_balancing_loss=load_balancing_loss_of_counts(aux.mean_probs, counts))
    total = lm + moe.aux_loss_coef * aux.load_balancing_loss.mean()
    return TrainingLoss(total + moe.z_loss_coef * aux.router_z_loss.mean(), lm, aux)
