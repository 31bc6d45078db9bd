"""The reference of all keys: train.py --help, and the table of configs/README.md."""

import train
from moe.config import Config, flat_config, on_resume
from moe.config.reference import END, START, help_text, markdown, replace_table

# The keys that other tools rely on.
CONTRACT = """
run.name run.dir run.seed run.resume
model.d_model model.n_layers model.n_heads model.n_kv_heads model.head_dim model.d_ff model.max_seq_len
model.rope_theta model.tie_embeddings model.qk_norm model.vocab_size
moe.num_experts moe.top_k moe.d_ff_expert moe.num_shared_experts moe.capacity_factor
moe.normalize_gate_weights moe.aux_loss_coef moe.z_loss_coef moe.every_n_layers moe.first_dense_layers
data.source data.text_field data.tokenizer data.seq_len data.streaming
train.steps train.global_batch_size train.micro_batch_size train.eval_interval train.eval_batches
train.checkpoint_interval train.keep_checkpoints train.activation_checkpointing train.compile
optim.lr optim.min_lr_ratio optim.warmup_steps optim.betas optim.weight_decay optim.grad_clip
parallel.ep_size parallel.zero_stage parallel.precision parallel.timeout_s
log.interval log.wandb log.wandb_project
"""


def test_the_contract_keys_exist_and_help_lists_every_key_with_a_meaning(capsys):
    keys = flat_config(Config())
    assert set(CONTRACT.split()) <= set(keys)
    assert train.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for key in keys:
        assert f"  {key} " in shown, key
    assert all(len(line.split()) > 3 for line in help_text().splitlines())


def test_the_table_says_of_every_key_whether_it_may_change_on_resume():
    rows = [line.split("|") for line in markdown().splitlines() if line.startswith("| `")]
    said = {row[1].strip(" `"): row[-2].strip() for row in rows}
    assert said == {key: "" if on_resume(key) == "refused" else "yes" for key in flat_config(Config())}


def test_only_what_is_between_the_markers_is_replaced():
    page = f"before\n{START}\nold\n{END}\nafter\n"
    assert replace_table(page) == f"before\n{START}\n\n{markdown()}\n\n{END}\nafter\n"
    assert replace_table(replace_table(page)) == replace_table(page)
