"""The configuration: keys, checks, YAML files and command-line overrides. Nothing here imports torch."""

from moe.config.errors import ConfigError, RunError, check_type, first_line
from moe.config.loading import changed, dump_config, flat_config, load_config, override_value, parse_config
from moe.config.schema import Config, OnResume, config_fields, on_resume
from moe.config.sections import (
    CostConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from moe.config.unused import DENSE_KEYS, unused_keys
