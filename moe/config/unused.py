"""Which keys of a configuration make no difference to its runs."""

from moe.config.schema import Config
from moe.config.sections import MoEConfig

# Keys of the section moe that matter for a model without a router.
DENSE_KEYS = (
    "moe.num_experts", "moe.num_shared_experts", "moe.d_ff_expert",
    "moe.every_n_layers", "moe.first_dense_layers",
)  # fmt: skip
_OF_FILES = ("data.subset", "data.text_field", "data.suffixes", "data.encoding", "data.on_bad_record")


def unused_keys(config: Config) -> set[str]:
    """Dotted keys whose values make no difference to a run of this configuration."""
    model, data, unused = config.model, config.data, set[str]()
    if config.moe.is_dense:
        unused |= {f"moe.{name}" for name in MoEConfig.model_fields} - set(DENSE_KEYS)
    if not config.moe.normalizes:
        unused.add("moe.normalize_gate_weights")
    if config.moe.router != "switch":
        unused.add("moe.router_jitter")
    if config.moe.router != "expert_choice":
        unused.add("moe.allow_causal_leak")
    if config.moe.aux_loss_coef == 0:
        unused.add("moe.aux_loss_scope")
    if len(config.moe_layers) == model.n_layers:
        unused.add("model.d_ff")
    if not model.qk_norm:
        unused.add("model.qk_norm_scope")
    if data.source == "stdlib" and not (data.sources or data.validation or data.extra_validation):
        unused.update(_OF_FILES)
    return unused
