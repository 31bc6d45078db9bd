"""The only importer of DeepSpeed: start the process group, wrap the model in ZeRO, reach the training state.

One process is world size 1 of the same engine, and CPU is gloo of the same engine.
"""

import datetime
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from moe.checkpoint import check_names
from moe.config import Config, ConfigError, ParallelConfig
from moe.optim import parameter_groups

# Measured on CPU with 33.5M parameters: 4M elements save 80 of 300 ms a step against the default of 500M.
_CPU_BUCKET_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device


def world_size() -> int:
    """Number of processes that the launcher started; 1 without one.

    Raises:
        ConfigError: the environment is half a launcher's.
    """
    if not _launched():
        return 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError("WORLD_SIZE", f"is set but {', '.join(missing)} not; use torchrun, or unset it")
    return int(os.environ["WORLD_SIZE"])


def _launched() -> bool:
    return "WORLD_SIZE" in os.environ


def choose_device(parallel: ParallelConfig) -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if parallel.device == "cuda" and not has_cuda:
        raise ConfigError("parallel.device", "torch sees no CUDA device; set it to cpu or auto")
    if parallel.device == "cpu" or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start(parallel: ParallelConfig) -> World:
    """Join the process group; under no launcher, make one of size 1. A second call joins the same one."""
    device = choose_device(parallel)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=parallel.timeout_s)
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not _launched() and not torch.distributed.is_initialized():
        # No launcher: DeepSpeed would ask for mpi4py. A store in memory needs no free port either.
        store = HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)

    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    _quiet_deepspeed()
    # Its shared-memory collectives would be compiled with g++ on first use; a run killed meanwhile leaves a
    # lock on which every later run hangs. gloo does the same work.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def stop() -> None:
    """Leave the process group, for good: DeepSpeed keeps references to it and cannot start a second one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.optim.weight_decay),
            lr=config.optim.lr,
            betas=config.optim.betas,
            fused=True,  # on CPU it also keeps DeepSpeed from compiling its own Adam
        )
        wrapped, *_ = deepspeed.initialize(
            model=model.to(world.device), optimizer=optimizer, config=_deepspeed_config(config, world)
        )
        self._deepspeed: Any = wrapped
        self._zero: Any = wrapped.optimizer

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

    def step(self, learning_rate: float) -> float | None:
        """End a micro batch; with the last one of a global batch, clip and update.

        Returns:
            The global L2 norm of the update's gradient, before clipping; None where there was no update.
        """
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        updates = self._deepspeed.is_gradient_accumulation_boundary()
        self._deepspeed.step()
        return float(self._deepspeed.get_global_grad_norm()) if updates else None

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Element-wise sum over all ranks, in place."""
        if self.world.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def any_rank(self, happened: bool) -> bool:
        """Whether it happened on any rank; every rank gets the same answer."""
        return bool(self.sum_over_ranks(torch.tensor(float(happened), device=self.world.device)))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The training state by kind and parameter name: fp32 `weights`, `exp_avg`, `exp_avg_sq`, and `rng`.

        A collective: every rank must call it, and each gets full tensors.
        """
        kinds: dict[str, dict[str, Tensor]] = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for name, parameter in self.module.named_parameters():
            for kind, named in kinds.items():
                full = torch.zeros(parameter.numel(), dtype=torch.float32, device=self.world.device)
                for inside, fragment in self._fragments(parameter, kind):
                    full[inside].copy_(fragment)
                named[name] = self.sum_over_ranks(full).view(parameter.shape).cpu()
        rng = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.world.device)
        return {**kinds, "rng": rng}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], steps_taken: int) -> None:
        """Put back what `state` returned.

        Args:
            state: kind -> name -> tensor.
            steps_taken: optimizer steps behind that state, for Adam's bias correction.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of another shape; nothing was changed then.
        """
        parameters = dict(self.module.named_parameters())
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            check_names(parameters, state[kind], kind)
        for flat in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[flat] = {
                "step": torch.tensor(float(steps_taken), device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        for name, parameter in parameters.items():
            for kind in ("weights", "exp_avg", "exp_avg_sq"):
                for inside, fragment in self._fragments(parameter, kind):
                    fragment.copy_(state[kind][name].flatten()[inside])
            parameter.copy_(state["weights"][name])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.world.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.world.device)

    def _fragments(self, parameter: nn.Parameter, kind: str) -> Iterator[tuple[slice, Tensor]]:
        """This rank's part of a parameter's fp32 state: where it lies in the parameter, and a view of it.

        ZeRO flattens the parameters of a group, splits the result over the ranks and records in `_hp_mapping`
        which slice of a parameter fell to this rank. DeepSpeed's own accessors are no help: they link the
        moments before every group has been stepped.
        """
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        source = flat if kind == "weights" else self._zero.optimizer.state[flat][kind]
        inside, place = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield (
            slice(inside.start, inside.start + inside.numel),
            source.detach().narrow(0, place.start, place.numel),
        )


def _deepspeed_config(config: Config, world: World) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.parallel.zero_stage}
    if world.device.type == "cpu":
        zero["reduce_bucket_size"] = _CPU_BUCKET_ELEMENTS
    settings = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(world.size),
        "gradient_clipping": config.optim.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.parallel.precision == "bf16"},
        "steps_per_print": None,
    }
    if config.parallel.zero_stage == 2:
        # Under stage 1 this would select DeepSpeed's BF16_Optimizer, whose norm leaves experts out.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _quiet_deepspeed() -> None:
    for name, logger in logging.root.manager.loggerDict.items():
        if name.lower().startswith("deepspeed") and isinstance(logger, logging.Logger):
            logger.setLevel(logging.ERROR)
