"""One step of train.py against PyTorch alone: the loss written out, its gradients, clipping and AdamW."""

import json

import torch
import torch.nn.functional as F
import yaml

from moe.config import parse_config
from moe.data.samples import read_samples, samples_of_step
from moe.data.token_cache import prepare_corpus
from moe.model.router import Router
from moe.model.transformer import Transformer
from tests.support.runs import final_state

AUX, Z, CLIP, LR, BETAS, EPS, DECAY = 8.0, 3.0, 0.5, 0.02, (0.9, 0.95), 1e-8, 0.1
TOP_K, NUM_EXPERTS, SAMPLES = 2, 4, 4


def documented_loss(model, samples):
    """CE + AUX * mean over layers of E sum f P, by sequence, + Z * mean over layers of logsumexp squared."""
    logits_of_layers = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(
                lambda _, __, routing: logits_of_layers.append(routing.router_logits)
            )
    predicted = model(samples[:, :-1]).logits
    ce = F.cross_entropy(predicted.flatten(0, 1), samples[:, 1:].flatten())
    balance, z = [], []
    for logits_TE in logits_of_layers:
        probs_BSE = logits_TE.softmax(1).unflatten(0, (SAMPLES, -1))
        chosen = F.one_hot(probs_BSE.topk(TOP_K).indices, NUM_EXPERTS).sum(2)  # 0 or 1
        shares, means = chosen.float().mean(1) / TOP_K, probs_BSE.mean(1)
        balance.append((NUM_EXPERTS * (shares * means).sum(1)).mean())
        z.append(logits_TE.exp().sum(1).log().square().mean())
    assert len(balance) == 2, "two MoE layers"
    return ce + AUX * (balance[0] + balance[1]) / 2 + Z * (z[0] + z[1]) / 2


def test_the_first_update_is_adamw_on_the_documented_loss(run_main):
    code, run, _, _ = run_main(
        "train.steps=1", "optim.warmup_steps=0", f"optim.lr={LR}", f"optim.grad_clip={CLIP}",
        f"moe.aux_loss_coef={AUX}", f"moe.z_loss_coef={Z}", f"optim.weight_decay={DECAY}",
        f"train.global_batch_size={SAMPLES}", "train.micro_batch_size=2", "model.dropout=0.0",
    )  # fmt: skip
    assert code == 0
    config = parse_config(yaml.safe_load((run / "config.yaml").read_text()))
    corpus = prepare_corpus(config)
    starts = samples_of_step(config, corpus.train, 0)
    samples = torch.from_numpy(read_samples(corpus.train.tokens, starts, config.data.seq_len))
    model = Transformer(config, expert_path="reference")
    documented_loss(model, samples).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    norm = torch.stack([grad.norm() for grad in gradients.values() if grad is not None]).norm()
    assert norm > 2 * CLIP, "the clipping must bite"

    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    torch.testing.assert_close(logged["optim/grad_norm"], norm.item(), rtol=1e-4, atol=0)
    state = final_state(run)
    for name, weight in model.named_parameters():
        gradient = gradients[name]
        assert gradient is not None
        clipped = gradient * CLIP / norm
        torch.testing.assert_close(state[f"exp_avg/{name}"], (1 - BETAS[0]) * clipped, rtol=1e-3, atol=1e-8)
        torch.testing.assert_close(
            state[f"exp_avg_sq/{name}"], (1 - BETAS[1]) * clipped.square(), rtol=2e-3, atol=1e-12
        )
        decayed = weight * (1 - LR * DECAY) if weight.dim() > 1 else weight
        # Adam's first step: both moments, without their bias, are those of the gradient.
        expected = decayed - LR * clipped / (clipped.abs() + EPS)
        close = torch.isclose(state[f"weights/{name}"], expected, rtol=0, atol=1e-2 * LR)
        is_clear = clipped.abs() > 1e-6  # below, the sign that decides is one of rounding
        assert close[is_clear].all(), name
        assert is_clear.float().mean() > 0.1, name
