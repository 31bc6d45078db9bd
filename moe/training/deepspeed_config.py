"""The settings for DeepSpeed. Imports neither DeepSpeed nor torch, since the memory estimate reads it too."""

from typing import Any

from moe.config import Config

# Elements reduced at a time. On CPU, with 33.5M parameters, 4M saved 80 of 300 ms a step against DeepSpeed's
# default of 500M, which on a GPU would take 1 GiB in bf16; 50M is unmeasured.
_REDUCE_BUCKET_CPU, _REDUCE_BUCKET_GPU = 4_000_000, 50_000_000


def reduces_gradients(config: Config, world_size: int) -> bool:
    """Whether DeepSpeed reduces gradients or adds them up in fp32; alone in fp32 under ZeRO 1 it need not."""
    return world_size > 1 or config.parallel.zero_stage == 2 or config.parallel.precision == "bf16"


def reduce_bucket(config: Config, world_size: int, device: str) -> int:
    """Elements of DeepSpeed's buffer, which it allocates even where nothing is reduced."""
    if not reduces_gradients(config, world_size):
        return 1
    return _REDUCE_BUCKET_CPU if device == "cpu" else _REDUCE_BUCKET_GPU


def deepspeed_config(config: Config, world_size: int, device: str) -> dict[str, Any]:
    """DeepSpeed's JSON configuration for a run on devices such as `cpu` or `cuda`."""
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(world_size),
        # The engine takes the norm and clips: DeepSpeed would copy every gradient to fp64 for it.
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "reduce_bucket_size": reduce_bucket(config, world_size, device),
            "compute_grad_norm": False,
        },
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",  # a mean over ranks in bf16 is off by 2e-3
        "timers": {"throughput": {"enabled": False}},  # waits for the device twice a micro batch
        "bf16": {"enabled": config.parallel.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }
