"""The only importer of DeepSpeed: start the process group, wrap the model in ZeRO, reach the training state.

One process is world size 1 of the same engine, and CPU is gloo of the same engine.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.linalg import vector_norm

from moe.accounting.memory import REDUCE_BUCKET
from moe.checkpoint.saving import Checkpoint, Fragment
from moe.config.schema import Config, ParallelConfig
from moe.distributed.groups import ParallelGroups
from moe.distributed.launch import choose_device, join, set_timeouts
from moe.distributed.topology import Topology
from moe.model.experts import GroupedExperts
from moe.training.optimizer import parameter_family, parameter_groups

_KINDS = ("weights", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device
    groups: ParallelGroups


class GradNorms(NamedTuple):
    """L2 norms of the gradient of one update, before clipping; a parameter counts once, wherever it lives.

    `total` is DeepSpeed's, which the clipping uses; the others are summed up here, and their squares add up
    to its square. None where a model has no such parameters.
    """

    total: float
    dense: float | None
    router: float | None
    experts: float | None

    def families(self) -> dict[str, float | None]:
        """The norms by family of parameters."""
        return {name: norm for name, norm in self._asdict().items() if name != "total"}


def start(parallel: ParallelConfig) -> World:
    """Join the process group and make those of expert parallelism. A second call joins the same ones.

    Raises:
        ConfigError: `parallel.ep_size` does not divide the number of ranks.
    """
    device = choose_device(parallel)
    os.environ["DS_ACCELERATOR"] = device.type
    join(parallel, device)

    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from deepspeed.utils import groups

    _quiet_deepspeed()
    # Its shared-memory collectives would be compiled with g++ on first use; a run killed meanwhile leaves a
    # lock on which every later run hangs. gloo does the same work.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    deepspeed.init_distributed(verbose=False)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    topology = Topology(size, parallel.ep_size)
    groups._create_expert_and_data_parallel(parallel.ep_size)
    name = f"ep_size_{parallel.ep_size}"
    made = ParallelGroups(
        dp_group=cast("ProcessGroup", groups._get_data_parallel_group()),
        ep_group=groups._get_expert_parallel_group(name),
        edp_group=groups._get_expert_data_parallel_group(name),
        ep_size=parallel.ep_size,
        ep_rank=topology.ep_rank(rank),
    )
    for group, expected in (
        (made.dp_group, [list(range(size))]),
        (made.ep_group, topology.ep_groups),
        (made.edp_group, topology.edp_groups),
    ):
        ranks = torch.distributed.get_process_group_ranks(group)
        assert ranks in expected, (ranks, expected)
    set_timeouts(parallel.timeout_s)
    return World(rank, size, device, made)


class Engine:
    """A model under DeepSpeed's ZeRO with AdamW.

    Args:
        model: initialised, on any device.
        config: the run's configuration.
        world: what `start` returned.
    """

    def __init__(self, model: nn.Module, config: Config, world: World):
        import deepspeed

        self.world = world
        self._config = config
        self._layouts = dict(_layouts(model))
        groups = parameter_groups(model, config.optim.weight_decay)
        if world.groups.ep_size > 1:
            groups = _split_experts(model, groups, world.groups.ep_size)
        optimizer = torch.optim.AdamW(
            groups,
            lr=config.optim.lr,
            betas=config.optim.betas,
            fused=True,  # on CPU it also keeps DeepSpeed from compiling its own Adam
        )
        wrapped, *_ = deepspeed.initialize(
            model=model.to(world.device), optimizer=optimizer, config=_deepspeed_config(config, world)
        )
        self._deepspeed: Any = wrapped
        self._zero: Any = wrapped.optimizer
        set_timeouts(config.parallel.timeout_s)  # DeepSpeed has made groups of its own
        self._squares = torch.zeros(len(GradNorms._fields), dtype=torch.float64, device=world.device)
        optimizer.register_step_pre_hook(self._add_squares)

    @property
    def module(self) -> nn.Module:
        """The model, its weights in the training precision."""
        return self._deepspeed.module

    def __call__(self, tokens: Tensor) -> Any:
        """Forward pass of the model."""
        return self._deepspeed(tokens)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro batch; the engine divides by their number."""
        self._deepspeed.backward(loss)

    def step(self, learning_rate: float) -> GradNorms | None:
        """End a micro batch; with the last one of a global batch, clip and update.

        Returns:
            The norms of the update's gradient; None where there was no update.
        """
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        updates = self._deepspeed.is_gradient_accumulation_boundary()
        self._squares.zero_()
        self._deepspeed.step()
        return self._grad_norms(float(self._deepspeed.get_global_grad_norm())) if updates else None

    def _add_squares(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Add up the squares of the clipped gradient that ZeRO hands to AdamW, group by group."""
        stepped = {id(flat) for group in optimizer.param_groups for flat in group["params"]}
        for name, parameter in self.module.named_parameters():
            for flat, _inside, place in self._fragments(parameter):
                if id(flat) in stepped:
                    family = GradNorms._fields.index(parameter_family(name))
                    assert flat.grad is not None
                    self._squares[family] += vector_norm(flat.grad[place], dtype=torch.float64).square()

    def _grad_norms(self, total: float) -> GradNorms:
        self.sum_over_ranks(self._squares)
        bound = self._config.optim.grad_clip
        shrunk = max(1.0, (total + 1e-6) / bound) if bound else 1.0  # what ZeRO divided the gradient by
        norms = (self._squares.sqrt() * shrunk).tolist()
        present = {parameter_family(name) for name in self._layouts}
        names = GradNorms._fields[1:]
        return GradNorms(
            total, *(norm if n in present else None for n, norm in zip(names, norms[1:], strict=True))
        )

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Element-wise sum over all ranks, in place."""
        if self.world.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def any_rank(self, happened: bool) -> bool:
        """Whether it happened on any rank; every rank gets the same answer."""
        return bool(self.sum_over_ranks(torch.tensor(float(happened), device=self.world.device)))

    def from_rank_0(self, values: Tensor) -> Tensor:
        """Overwrite a tensor with rank 0's, in place."""
        torch.distributed.broadcast(values, src=0)
        return values

    def state(self) -> Iterator[Fragment]:
        """This rank's share of the training state; over all ranks, each element comes exactly once.

        fp32 `weights`, `exp_avg` and `exp_avg_sq`, under the parameters' names and, for experts, at the
        places of their ids among all experts. Views: nothing is copied.
        """
        for name, parameter in self.module.named_parameters():
            layout = self._layouts[name]
            for flat, inside, place in self._fragments(parameter):
                for kind in _KINDS:
                    values = self._of_kind(flat, kind)[place]
                    yield Fragment(kind, name, layout.shape, layout.start + inside.start, values)

    @torch.no_grad()
    def load_state(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of any topology; each rank reads only what it holds.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of another shape; nothing was changed then.
        """
        for kind in _KINDS:
            checkpoint.check_names(kind, {name: layout.shape for name, layout in self._layouts.items()})
        for flat in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[flat] = {
                "step": torch.tensor(
                    float(checkpoint.step), device=flat.device
                ),  # for Adam's bias correction
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        for name, parameter in self.module.named_parameters():
            start = self._layouts[name].start
            for flat, inside, place in self._fragments(parameter):
                for kind in _KINDS:
                    self._of_kind(flat, kind)[place].copy_(
                        checkpoint.read(kind, name, start + inside.start, inside.stop - inside.start)
                    )
            parameter.copy_(checkpoint.read("weights", name, start, parameter.numel()).view(parameter.shape))

    def _of_kind(self, flat: Tensor, kind: str) -> Tensor:
        return flat.detach() if kind == "weights" else self._zero.optimizer.state[flat][kind]

    def _fragments(self, parameter: nn.Parameter) -> Iterator[tuple[Tensor, slice, slice]]:
        """This rank's part of a parameter: the flat fp32 tensor it is in, and its places in both.

        ZeRO flattens the parameters of a group, splits the result over the ranks and records in `_hp_mapping`
        which slice of a parameter fell to this rank. DeepSpeed's own accessors are no help: they link the
        moments before every group has been stepped.
        """
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return
        inside, place = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield (
            self._zero.single_partition_of_fp32_groups[mapping.param_group_index],
            slice(inside.start, inside.start + inside.numel),
            slice(place.start, place.start + place.numel),
        )


class _Layout(NamedTuple):
    """Where a rank's parameter lies in the model's: the whole shape, and the first element in it."""

    shape: tuple[int, ...]
    start: int


def _layouts(model: nn.Module) -> Iterator[tuple[str, _Layout]]:
    ids = {
        id(weight): (module.expert_ids, module.num_experts)
        for module in model.modules()
        if isinstance(module, GroupedExperts)
        for weight in module.parameters()
    }
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if id(parameter) in ids:
            here, num_experts = ids[id(parameter)]
            yield name, _Layout((num_experts, *shape[1:]), here.start * parameter[0].numel())
        else:
            yield name, _Layout(shape, 0)


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
            """The groups exist."""

    for module in list(model.modules()):
        if isinstance(module, GroupedExperts):
            module.deepspeed_marker = Marker(module)
            for weight in module.parameters():
                weight.allreduce, weight.group_name = False, f"ep_size_{ep_size}"  # type: ignore[attr-defined]
    return split_params_into_different_moe_groups_for_optimizer(groups)


def _deepspeed_config(config: Config, world: World) -> dict[str, Any]:
    bucket = REDUCE_BUCKET[world.device.type]
    settings = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(world.size),
        "gradient_clipping": config.optim.grad_clip,
        "zero_optimization": {"stage": config.parallel.zero_stage, "reduce_bucket_size": bucket},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.parallel.precision == "bf16"},
        "steps_per_print": None,
    }
    if config.parallel.zero_stage == 2:
        # Under stage 1 this would select DeepSpeed's BF16_Optimizer, whose norm leaves experts out.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _quiet_deepspeed() -> None:
    warnings.filterwarnings(
        "ignore", message=r"`torch.distributed.all_gather_into_tensor`", category=FutureWarning
    )
    for name, logger in logging.root.manager.loggerDict.items():
        if name.lower().startswith("deepspeed") and isinstance(logger, logging.Logger):
            logger.setLevel(logging.ERROR)
