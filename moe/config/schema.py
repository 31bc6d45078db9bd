"""The complete configuration of a run: all sections, and what follows from several keys together."""

from collections.abc import Iterator
from itertools import chain
from typing import Self, cast, get_args

from pydantic import model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from moe.config.checks import data_conflicts, expert_conflicts, model_conflicts, training_conflicts
from moe.config.errors import ConfigError
from moe.config.sections import (
    CostConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    MoEConfig,
    OnResume,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    Section,
    TrainConfig,
)


class Config(Section):
    """One run, complete: every section with every default filled in."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()
    cost: CostConfig = CostConfig()

    @model_validator(mode="after")
    def _check_across_fields(self) -> Self:
        found = chain(
            model_conflicts(self.model, self.data),
            data_conflicts(self.data),
            expert_conflicts(self.model, self.moe, self.parallel),
            training_conflicts(self.train, self.optim, self.parallel),
        )
        for key, message in found:
            raise PydanticCustomError("conflict", "{key}: {message}", {"key": key, "message": message})
        return self

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding.

        Raises:
            ConfigError: `model.vocab_size` is null, so it has to come from the tokenizer: see `resolve`.
        """
        if self.model.vocab_size is None:
            fix = "set it, or take the tokenizer's, as in config.resolve(4096)"
            raise ConfigError("model.vocab_size", f"is null; {fix}")
        return self.model.vocab_size

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers at MoE positions."""
        return self.moe.layers(self.model.n_layers)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        given = self.optim.warmup_steps
        return self.train.steps // 20 if given is None else given

    def accumulation_steps(self, world_size: int) -> int:
        """Forwards per rank that make up one global batch.

        Raises:
            ConfigError: the global batch does not split evenly over the ranks and their micro batches.
        """
        micro, total = self.train.micro_batch_size, self.train.global_batch_size
        if total % (micro * world_size):
            fitting = next((m for m in range(micro, 0, -1) if total % (m * world_size) == 0), None)
            other_total = micro * world_size * max(1, round(total / (micro * world_size)))
            fix = f"train.micro_batch_size={fitting}" if fitting else str(other_total)
            problem = f"{total} is not a multiple of train.micro_batch_size ({micro}) x {world_size} ranks"
            raise ConfigError("train.global_batch_size", f"{problem}; use {fix}")
        return total // (micro * world_size)

    def resolve(self, tokenizer_vocab_size: int) -> Self:
        """The same configuration with `model.vocab_size` filled in.

        Raises:
            ConfigError: `model.vocab_size` is smaller than the tokenizer's vocabulary.
        """
        vocab_size = self.model.vocab_size or tokenizer_vocab_size
        if vocab_size < tokenizer_vocab_size:
            problem = f"{vocab_size} is less than the tokenizer's {tokenizer_vocab_size}"
            raise ConfigError("model.vocab_size", f"{problem}; raise it or use null")
        model = self.model.model_copy(update={"vocab_size": vocab_size})
        return self.model_copy(update={"model": model})


def config_fields() -> dict[str, FieldInfo]:
    """Dotted key -> field, in the order of the sections."""
    return {f"{name}.{key}": field for name, of in _sections() for key, field in of.model_fields.items()}


def on_resume(key: str) -> OnResume:
    """What happens when a resumed run changes this dotted key."""
    marks = [mark for mark in config_fields()[key].metadata if mark in get_args(OnResume)]
    return marks[0] if marks else dict(_sections())[key.partition(".")[0]].on_resume


def _sections() -> Iterator[tuple[str, type[Section]]]:
    for name, field in Config.model_fields.items():
        yield name, cast("type[Section]", field.annotation)
