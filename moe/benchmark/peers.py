"""The MoE layers of DeepSpeed and of Hugging Face transformers, with our weights."""

import torch
from torch import Tensor, nn

from moe.benchmark.layer_problem import LayerProblem
from moe.config import ParallelConfig
from moe.model.experts import SwiGLU
from moe.training.engine import start


def deepspeed_layer(problem: LayerProblem) -> nn.Module:
    """`deepspeed.moe.layer.MoE` in one process, dropping no token; its experts share memory with ours."""
    device = "cuda" if problem.device.type == "cuda" else "cpu"
    start(ParallelConfig(device=device, keep_freed_memory=False))  # that is not decided here
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.sharded_moe import TopKGate

    shape, weights = problem.shape, problem.weights
    with torch.device("meta"):
        layer = MoE(
            hidden_size=shape.d_model,
            expert=SwiGLU(shape.d_model, shape.d_ff_expert),
            num_experts=shape.num_experts,
            k=shape.top_k,
            drop_tokens=False,
            use_rts=False,  # else it draws random numbers that dropping alone would need
            top2_2nd_expert_sampling=False,  # else the second expert is drawn at random
        )
    layer.set_deepspeed_parallelism()
    gate = layer.deepspeed_moe.gate
    assert isinstance(gate, TopKGate)
    gate.wg.weight = nn.Parameter(weights["router.weight"].clone())
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    assert isinstance(experts, nn.ModuleList)
    for e, expert in enumerate(experts):
        for name in ("w_gate", "w_up", "w_down"):
            setattr(expert, name, nn.Parameter(weights[f"experts.{name}"][e]))
    return layer


def mixtral_block(problem: LayerProblem, implementation: str) -> nn.Module:
    """The Mixtral block of transformers with a copy of our weights, its experts `eager` or `grouped_mm`."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    shape, weights = problem.shape, problem.weights
    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff_expert,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        hidden_act="silu",
        router_jitter_noise=0.0,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    w_gate, w_up, w_down = (weights[f"experts.{name}"] for name in ("w_gate", "w_up", "w_down"))
    block.gate.weight = nn.Parameter(weights["router.weight"].clone())
    block.experts.gate_up_proj = nn.Parameter(_rows_first(torch.cat([w_gate, w_up], dim=2)))
    block.experts.down_proj = nn.Parameter(_rows_first(w_down))
    return block


def _rows_first(weights: Tensor) -> Tensor:
    """(E, in, out) as (E, out, in), as `torch.nn.Linear` stores it."""
    return weights.transpose(1, 2).contiguous()
