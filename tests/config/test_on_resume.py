"""Which keys a resumed run may change: the list is written out here, as each one is a decision."""

from moe.config import Config, MoEConfig, flat_config, on_resume
from moe.runs.resuming import sets_results

# No result depends on these.
FREE = """
run.name run.dir run.resume data.revision data.source_revisions data.tokenizer_revision
data.cache_dir data.cache_timeout_s
train.micro_batch_size train.eval_interval train.checkpoint_interval train.keep_checkpoints
train.activation_checkpointing train.compile optim.max_skips
parallel.device parallel.ep_size parallel.dispatch parallel.overlap parallel.keep_freed_memory
parallel.zero_stage parallel.timeout_s
log.interval log.wandb log.tensorboard log.wandb_project
cost.peak_flops cost.watts cost.usd_per_hour cost.pue cost.kg_co2e_per_kwh
"""
# A resumed run may change these, but a finished run with another value is another result.
EXTENDS = "train.steps train.skip_steps optim.warmup_steps optim.skip_norm_above parallel.precision"


def test_exactly_these_keys_are_free():
    assert {key for key in flat_config(Config()) if on_resume(key) == "free"} == set(FREE.split())


def test_exactly_these_keys_extend_a_run():
    assert {key for key in flat_config(Config()) if on_resume(key) == "extends"} == set(EXTENDS.split())


def test_all_other_keys_are_refused_and_all_but_the_free_ones_set_results():
    for key in flat_config(Config()):
        may_change = key in FREE.split() or key in EXTENDS.split()
        assert (on_resume(key) == "refused") == (not may_change), key
        assert sets_results(key, Config()) == (key not in FREE.split()), key


def test_with_a_capacity_the_micro_batch_sets_results():
    capacity = Config(moe=MoEConfig(capacity_factor=1.0))
    assert sets_results("train.micro_batch_size", capacity)
    dense = MoEConfig(capacity_factor=1.0, num_experts=1, top_k=1)
    assert not sets_results("train.micro_batch_size", Config(moe=dense))
