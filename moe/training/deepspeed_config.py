"""The settings for DeepSpeed. Imports neither DeepSpeed nor torch, since the memory estimate reads it too."""

from typing import Any

from moe.config import Config

# Elements reduced at a time. On CPU, with 33.5M parameters, 4M saved 80 of 300 ms a step against DeepSpeed's
# default of 500M, which on a GPU would take 1 GiB in bf16; 50M is unmeasured.
REDUCE_BUCKET = {"cpu": 4_000_000, "cuda": 50_000_000}


def reduces_gradients(config: Config, world_size: int) -> bool:
    """Whether DeepSpeed has anything to reduce; a single process under ZeRO 1 has not."""
    return world_size > 1 or config.parallel.zero_stage == 2


def deepspeed_config(config: Config, world_size: int, device: str) -> dict[str, Any]:
    """DeepSpeed's JSON configuration for a run; `device` is `cpu` or `cuda`."""
    settings = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(world_size),
        # The engine takes the norm and clips: DeepSpeed would copy every gradient to fp64 for it.
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            # DeepSpeed allocates the bucket even where nothing is reduced.
            "reduce_bucket_size": REDUCE_BUCKET[device] if reduces_gradients(config, world_size) else 1,
            "compute_grad_norm": False,
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.parallel.precision == "bf16"},
        "steps_per_print": None,
    }
    if config.parallel.zero_stage == 2:
        # Under stage 1 this would select DeepSpeed's BF16_Optimizer, whose norm leaves experts out.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
