"""DeepSpeed, as far as training needs it: start the process group, wrap the model in ZeRO, update it.

A single process runs the same code with world size 1, and a CPU the same code over gloo.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe.config import Config, ParallelConfig
from moe.distributed.groups import ParallelGroups, World
from moe.distributed.launch import (
    choose_device,
    join,
    join_alone,
    keep_freed_memory,
    leave,
    set_timeouts,
    widest_float,
)
from moe.distributed.topology import Topology
from moe.model.experts import GroupedExperts
from moe.model.parameter_roles import family, parameter_roles
from moe.model.transformer import Transformer, TransformerOutput
from moe.training.deepspeed_config import deepspeed_config, reduces_gradients
from moe.training.grad_norms import FAMILIES, GradNorms
from moe.training.optimizer import parameter_groups
from moe.training.skipped_updates import UpdateGuard
from moe.training.zero_state import ZeroState

_NORM_PIECE = 2**16  # elements; the fp32 norm of 10^8 of them at once is off by 1 %


def start(parallel: ParallelConfig) -> World:
    """Join all ranks and make the expert-parallel groups. A second call returns the same ones.

    Raises:
        ConfigError: `parallel.ep_size` does not divide the number of ranks.
    """
    device = choose_device(parallel)
    if parallel.keep_freed_memory and device.type == "cpu":
        keep_freed_memory()
    os.environ["DS_ACCELERATOR"] = device.type
    join(parallel, device)

    world = _make_groups(parallel.ep_size, device)
    set_timeouts(parallel.timeout_s)
    return world


@contextmanager
def rank_alone(rank: int, size: int, ep_size: int) -> Iterator[World]:
    """Be one of `size` ranks without the others: its groups are those of a run, and nothing is sent.

    For a process that has not joined one, and that no run is started in meanwhile.

    Raises:
        ConfigError: `ep_size` does not divide `size`.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    join_alone(rank, size)
    try:
        yield _make_groups(ep_size, torch.device("meta"))
    finally:
        from deepspeed.utils import groups

        leave()
        # DeepSpeed keeps its groups by name, and would return them to the next rank.
        for kept in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP):
            kept.clear()
        groups._WORLD_GROUP = None


def check_settings(settings: dict[str, Any]) -> None:
    """Let DeepSpeed read its configuration as at the start of a run, on a rank that has its groups.

    Raises:
        AssertionError: from DeepSpeed, if the batch sizes disagree with the number of ranks.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(settings)


def _make_groups(ep_size: int, device: torch.device) -> World:
    """Let DeepSpeed make the groups of the ranks that joined, and check them against the topology."""
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from deepspeed.utils import groups

    _quiet_deepspeed()
    # Its shared-memory collectives would be compiled with g++ on first use; a run killed meanwhile leaves a
    # lock on which every later run hangs. gloo does the same work.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    deepspeed.init_distributed(verbose=False)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    topology = Topology(size, ep_size)
    groups._create_expert_and_data_parallel(ep_size)
    name = f"ep_size_{ep_size}"
    made = ParallelGroups(
        dp_group=cast("ProcessGroup", groups._get_data_parallel_group()),
        ep_group=groups._get_expert_parallel_group(name),
        edp_group=groups._get_expert_data_parallel_group(name),
        ep_size=ep_size,
        ep_rank=topology.ep_rank(rank),
    )
    found, ep_groups, edp_groups = made.members(), topology.ep_groups, topology.edp_groups
    for group, expected in (("dp", [list(range(size))]), ("ep", ep_groups), ("edp", edp_groups)):
        assert rank in found[group], (rank, group, found[group])
        assert found[group] in expected, (group, found[group], expected)
    assert found["ep"].index(rank) == made.ep_rank, (rank, found["ep"], made.ep_rank)
    return World(rank, size, device, made)


class Engine:
    """A model under DeepSpeed's ZeRO with AdamW.

    Args:
        model: on the meta device, to be followed by `training_state.initialize` or `load`; or anywhere else,
            with its weights.
        config: the run's configuration.
        world: what `start` returned.
    """

    def __init__(self, model: Transformer, config: Config, world: World):
        import deepspeed

        self.world = world
        self._grad_clip = config.optim.grad_clip
        self.update_guard = UpdateGuard(config.optim.skip_norm_above, world.device)
        # Never on the device in fp32 if it trains in bf16; only routers are.
        model.to(torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32)
        if any(parameter.is_meta for parameter in model.parameters()):
            model.to_empty(device=world.device)
        roles = parameter_roles(model)
        self._family_of = {
            weight: FAMILIES.index(family(roles[name])) for name, weight in model.named_parameters()
        }
        groups = parameter_groups(model, config.optim.weight_decay)
        if world.groups.ep_size > 1:
            groups = _split_experts(model, groups, world.groups.ep_size)
        optimizer = torch.optim.AdamW(
            groups,
            lr=config.optim.lr,
            betas=config.optim.betas,
            fused=True,  # on CPU it also keeps DeepSpeed from compiling its own Adam
        )
        with _one_zero_optimizer():
            wrapped, *_ = deepspeed.initialize(
                model=model.to(world.device),
                optimizer=optimizer,
                config=deepspeed_config(config, world.size, world.device.type),
            )
        self._deepspeed: Any = wrapped
        # Routers' gradients are fp32, and bf16 ones are reduced in it.
        self._deepspeed.optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32
        self._adamw: Any = optimizer
        # Alone in fp32 there is nothing to reduce, and the copies that DeepSpeed makes for it are left out.
        self._reduces = reduces_gradients(config, world.size)
        wrapped.enable_backward_allreduce = self._reduces
        self.training_state = ZeroState(self.module, wrapped.optimizer)
        if config.parallel.precision == "fp32":
            self.training_state.train_in_place()
        set_timeouts(config.parallel.timeout_s)  # DeepSpeed has made groups of its own

    @property
    def module(self) -> Transformer:
        """The model, its weights in the training precision."""
        return self._deepspeed.module

    def __call__(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> TransformerOutput:
        """Forward pass of the model."""
        return self._deepspeed(tokens, documents, dropout_keys=dropout_keys, targets=targets)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro batch; the engine divides by their number."""
        self._deepspeed.backward(loss)

    def step(self, learning_rate: float) -> GradNorms | None:
        """End a micro batch; with the last one of a global batch, clip and update.

        Returns:
            The norms of the update's gradient; None if micro batches are to follow.
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()
            return None
        if not self._reduces:
            self._deepspeed.optimizer.overlapping_partition_gradients_reduce_epilogue()
        squares = self.sum_over_ranks(self._squares_by_family())
        norm = squares.sum().sqrt()
        self._adamw.found_inf = self.update_guard.skips(norm)  # AdamW then changes nothing
        if self._grad_clip:  # the update divides by it, where it reads the gradient anyway
            self._adamw.grad_scale = ((norm + 1e-6) / self._grad_clip).clamp(min=1).float()
        self._deepspeed.step()
        return self._grad_norms(squares)

    def _squares_by_family(self) -> Tensor:
        """This rank's share of the squared gradient norms, (families,) of `widest_float`."""
        norms: list[list[Tensor]] = [[torch.zeros((), device=self.world.device)] for _ in FAMILIES]
        for parameter, gradient in self.training_state.gradients():
            # As exact as fp64 throughout, which would copy every gradient. CUDA's norm goes by pieces itself.
            pieces = [gradient] if gradient.is_cuda else gradient.flatten().split(_NORM_PIECE)
            norms[self._family_of[parameter]] += torch.ops.aten._foreach_norm.Scalar(pieces, 2, torch.float32)
        dtype = widest_float(self.world.device)
        return torch.stack([torch.stack(each).to(dtype).square().sum() for each in norms])

    def _grad_norms(self, squares: Tensor) -> GradNorms:
        norms = torch.cat([squares.sum(0, keepdim=True), squares]).sqrt()
        skipped, total, *parts = torch.cat([self._adamw.found_inf.to(norms).view(1), norms]).tolist()
        present = set(self._family_of.values())
        shown = (part if i in present else None for i, part in enumerate(parts))
        return GradNorms(total, *shown, skipped=bool(skipped))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Element-wise sum over all ranks, in place."""
        if self.world.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def max_over_ranks(self, values: Tensor) -> Tensor:
        """Element-wise maximum over all ranks, in place."""
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return values

    def any_rank(self, *happened: bool) -> list[bool]:
        """Whether each of these happened on any rank; every rank gets the same answers."""
        counts = torch.tensor(happened, dtype=torch.float32, device=self.world.device)
        return [bool(count) for count in self.sum_over_ranks(counts).tolist()]

    def from_rank_0(self, values: Tensor) -> Tensor:
        """Overwrite a tensor with rank 0's, in place."""
        torch.distributed.broadcast(values, src=0)
        return values


def _split_experts(model: nn.Module, groups: list[dict[str, Any]], ep_size: int) -> list[dict[str, Any]]:
    """Tell DeepSpeed which parameters differ between the ranks of an `ep_group`.

    It looks for its own MoE layer among the modules; a marker without parameters is enough, and keeps ours
    free of DeepSpeed.
    """
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    class Marker(MoE):
        def __init__(self, experts: GroupedExperts):
            nn.Module.__init__(self)
            self.num_experts, self.num_local_experts = experts.num_experts, len(experts.expert_ids)
            self.ep_size, self.expert_group_name = ep_size, f"ep_size_{ep_size}"
            self.enable_expert_tensor_parallelism = False

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Nothing to do: the groups exist."""

    for module in list(model.modules()):
        if isinstance(module, GroupedExperts):
            module.deepspeed_marker = Marker(module)
            for weight in module.parameters():
                weight.allreduce, weight.group_name = False, f"ep_size_{ep_size}"  # type: ignore[attr-defined]
    return split_params_into_different_moe_groups_for_optimizer(groups)


@contextmanager
def _one_zero_optimizer() -> Iterator[None]:
    """Let DeepSpeed take the same optimizer in bf16 as in fp32.

    Under stage 1 with fp32 gradients it would take `BF16_Optimizer`, whose norm leaves experts out.
    """
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine

    engine: Any = DeepSpeedEngine
    choose = engine._do_optimizer_sanity_check
    engine._do_optimizer_sanity_check = lambda *_: ZERO_OPTIMIZATION
    try:
        yield
    finally:
        engine._do_optimizer_sanity_check = choose


def _quiet_deepspeed() -> None:
    warnings.filterwarnings("ignore", r"`torch.distributed.all_gather_into_tensor`", FutureWarning)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.lower().startswith("deepspeed") and isinstance(logger, logging.Logger):
            logger.setLevel(logging.ERROR)
