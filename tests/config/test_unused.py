"""Keys that a configuration does not use: no weight and no output depends on them."""

import pytest
import torch

from moe.config import Config, changed, parse_config, unused_keys
from moe.model.transformer import Transformer
from moe.training.loss import training_loss
from tests.support.models import SMALL, gradient_of

DENSE = {"moe.num_experts": 1, "moe.top_k": 1}
OTHER_VALUES = {
    "moe.top_k": 1,
    "moe.normalize_gate_weights": False,
    "moe.capacity_factor": 0.5,
    "moe.aux_loss_coef": 1.0,
    "moe.z_loss_coef": 1.0,
    "moe.router": "sigmoid",
    "moe.route_scale": 2.0,
    "moe.router_jitter": 0.5,
    "moe.allow_causal_leak": True,
    "moe.aux_loss_scope": "micro_batch",
    "model.d_ff": 72,
    "model.qk_norm_scope": "all_heads",
}
OF_OTHER_RULES = {"moe.router_jitter", "moe.allow_causal_leak"}
NOT_TRIED = {  # of a dense model
    "moe.num_groups", "moe.top_groups", "moe.bias_update_rate", "moe.shared_expert_gate",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "unused"),
    [
        ({}, {"model.d_ff", "model.qk_norm_scope"} | OF_OTHER_RULES),
        ({"model.qk_norm": True}, {"model.d_ff"} | OF_OTHER_RULES),
        ({"moe.first_dense_layers": 1, "model.qk_norm": True}, OF_OTHER_RULES),
        (
            {"moe.aux_loss_coef": 0.0, "model.d_ff": 64},
            {"moe.aux_loss_scope", "model.d_ff"} | OF_OTHER_RULES | {"model.qk_norm_scope"},
        ),
        (
            {"moe.router": "hash"},
            {"moe.normalize_gate_weights", "model.d_ff", "model.qk_norm_scope"} | OF_OTHER_RULES,
        ),
        (DENSE, set(OTHER_VALUES)),
        (DENSE | {"moe.every_n_layers": 2}, set(OTHER_VALUES) - {"model.d_ff"}),
    ],
    ids=["sparse", "qk norm", "a dense layer", "no loss", "hash", "dense", "dense, every second of experts"],
)
def test_a_key_is_unused_if_and_only_if_its_value_changes_nothing(changes, unused):
    config = changed(parse_config(SMALL), changes)
    found = {key for key in unused_keys(config) if not key.startswith("data.")}
    assert found - NOT_TRIED == unused
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (2, 12))

    def loss_and_gradients(config: Config):
        model = Transformer(config)
        loss = training_loss(model(tokens[:, :-1]), tokens[:, 1:], config.moe).total
        loss.backward()
        return loss, {name: gradient_of(weight) for name, weight in model.named_parameters()}

    loss, gradients = loss_and_gradients(config)
    for key, value in OTHER_VALUES.items():
        more = {"moe.normalize_gate_weights": False} if key == "moe.top_k" else {}
        other_loss, other = loss_and_gradients(changed(config, {key: value} | more))
        same = torch.equal(loss, other_loss) and gradients.keys() == other.keys()
        assert (same and all(torch.equal(gradients[n], other[n]) for n in gradients)) == (key in unused), key


def test_what_is_read_from_files_is_unused_where_there_are_none():
    keys = {"data.subset", "data.text_field", "data.suffixes", "data.encoding", "data.on_bad_record"}
    config = parse_config(SMALL)
    assert keys <= unused_keys(config)
    for key, value in {
        "data.source": "a.jsonl", "data.validation": "a.jsonl", "data.extra_validation": {"a": "a.jsonl"},
        "data.sources": {"a": {"source": "a.jsonl", "weight": 1.0}},
    }.items():  # fmt: skip
        assert not keys & unused_keys(changed(config, {key: value})), key
