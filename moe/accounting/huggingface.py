"""Count any causal language model that transformers can build, from its `config.json`; nothing is allocated.

The model is built on the meta device, and every tensor finds its part by where it stands: by the names and
classes around it and by its shape, so that a new model needs no table here. Experts are stacked tensors
(E, ., .), lists of modules, or rows of one matrix. Conventions beside those of `moe.accounting`:

- A router's correction bias counts, even where it is a buffer; a shared expert's gate belongs to that expert.
- Mixers without softmax (state spaces, linear attention, convolutions), towers for images and sound, and what
  has no other place are `other`. A token of text passes through no tower, so towers have no FLOPs.
- In a sliding window, a chunk, or sparse attention over `index_topk` keys a position meets fewer keys; the
  scores by which such an index chooses its keys are not counted. Compressed keys (DeepSeek-V4) count in full.
"""

import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.accounting.counts import PARTS, ModelCounts, causal_attention_flops, count_parameters
from moe.config import ConfigError, parse_config

if TYPE_CHECKING:  # importing them takes seconds, and counting our own models needs neither
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    # Part, trail, tensor, how many of its elements a token meets, whether tokens of text pass through it.
    _Use = tuple[str, str, Tensor, int, bool]

_PART_OF_TRAIL = (  # the first match wins; a trail reads /self_attn:MixtralAttention/q_proj:Linear/weight
    ("norms", r":\w*Norm\w*/\w+$"),
    ("shared_experts", r"/shared_(expert|mlp)"),
    ("router", r"/(\w*router\w*|gate):|(correction|expert)_bias$"),
    ("routed_experts", r":\w*Experts?\w*/|/experts:Module(List|Dict)/|:\w*MoE/\w+:Embedding/"),
    ("attention", r":\w*(Attention|MLA)/"),
    ("dense_blocks", r":\w*(MLP|FFN|FeedForward|Intermediate|Output)/|/fc[12]:"),
)
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size")


def count_huggingface(source: str, seq_len: int) -> ModelCounts:
    """Count parameters, and the FLOPs of a token of text in a sequence of `seq_len` tokens.

    Args:
        source: a `config.json`, a folder with one, or the name of a model on the Hugging Face hub.
        seq_len: at least 1.

    Raises:
        ConfigError: it is none of these, or no causal language model that transformers can build.
    """
    fix = "give a config.json, a folder with one, or the name of a model on the hub"
    with _quiet():
        try:
            file, name = _find(source)
            values = json.loads(file.read_text(encoding="utf-8"))
            fix = "give the config.json of a causal language model, or correct its fields"
            if values.get("model_type") == "deepseek":
                return _count_deepseek(values, name, seq_len)
            return _count(_build(file, values.get("model_type")), name, seq_len)
        except Exception as error:  # wrong fields make the code of a model fail in any way
            if isinstance(error, ConfigError) and error.key == "--hf":
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ConfigError("--hf", f"cannot count {source} ({reason}); {fix}") from None


def _find(source: str) -> tuple[Path, str]:
    """The `config.json` of a source, and a name for people."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file() or path.suffix == ".json":
        return path, path.resolve().parent.name if path.name == "config.json" else path.stem
    cached = try_to_load_from_cache(source, "config.json") if source.count("/") == 1 else None
    if isinstance(cached, str):
        return Path(cached), source
    HfApi().model_info(source, timeout=20)  # answers at once, where the download would retry for 23 s
    return Path(hf_hub_download(source, "config.json")), source


def _build(file: Path, model_type: Any) -> "PreTrainedModel":
    try:
        import torch
        import transformers
    except ImportError:
        raise ConfigError("--hf", "this needs transformers; pip install -e '.[hf]'") from None
    if model_type not in transformers.CONFIG_MAPPING:
        raise ConfigError("--hf", f"transformers has no model_type {model_type!r}; correct it or upgrade")
    config = transformers.AutoConfig.from_pretrained(file, trust_remote_code=False)
    if type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING:
        auto = transformers.AutoModelForMultimodalLM  # with its towers, as published
    elif type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        auto = transformers.AutoModelForCausalLM
    else:
        auto = None
    if auto is None or config.is_encoder_decoder:
        raise ConfigError("--hf", f"a {model_type} is no causal language model; count one that is")
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=False, attn_implementation="eager")


def _count(model: "PreTrainedModel", name: str, seq_len: int) -> ModelCounts:
    text: Any = model.config.get_text_config()
    trunk, layers = _find_layers(model)
    groups, flops = [], Counter()
    for index, layer in layers:
        kind = _layer_kind(text, index)
        groups.append(_uses_in_layer(layer, kind, _top_k(text, index)))
        flops["attention"] += sum(_score_flops(module, text, kind, seq_len) for module in layer.modules())
    groups.append(_uses_outside(model, trunk, {module for _, layer in layers for module in layer.modules()}))
    counts, idle = [Counter() for _ in groups], 0
    seen: set[int] = set()  # a tied tensor is one parameter, and multiplies in each place
    for uses, numbers in zip(groups, counts, strict=True):
        for part, trail, tensor, met, runs in uses:
            if runs and tensor.ndim >= 2 and "bias" not in trail.rpartition("/")[2]:
                flops[part] += 2 * met
            if id(tensor) not in seen:
                seen.add(id(tensor))
                numbers[part] += tensor.numel()
                idle += tensor.numel() - met
    if not counts[-1]["embedding"]:
        raise ConfigError("--hf", f"{name} has no vocabulary or no width; correct its fields")
    *by_layer, _, by_part = (_in_order(numbers) for numbers in [*counts, sum(counts, Counter())])
    return ModelCounts(name, seq_len, by_part, idle, _in_order(flops), tuple(by_layer))


def _in_order(numbers: Counter[str]) -> dict[str, int]:
    return {part: numbers[part] for part in PARTS if numbers[part]}


def _find_layers(model: "PreTrainedModel") -> "tuple[nn.Module, list[tuple[int, nn.Module]]]":
    """The smallest module with the input embedding and layers, and the layers, each with its index."""
    from torch import nn

    trunk, layers = model, []
    for module in model.modules():
        if model.get_input_embeddings() in set(module.modules()):
            outer = [child for name, child in module.named_modules() if not re.search(r"\.\d+(\.|$)", name)]
            stacks = [child for child in outer if isinstance(child, nn.ModuleList)]
            found = [pair for stack in stacks for pair in enumerate(stack) if list(pair[1].children())]
            trunk, layers = (module, found) if found else (trunk, layers)
    return trunk, layers


def _tensors(module: "nn.Module", trail: str = "") -> "Iterator[tuple[str, nn.Module, Tensor]]":
    """Every parameter, and every bias of a router, with its trail and the module that holds it."""
    for name, tensor in module.named_parameters(recurse=False):
        yield f"{trail}/{name}", module, tensor
    for name, tensor in module.named_buffers(recurse=False):
        if "bias" in name and _part_of(f"{trail}/{name}") == "router":
            yield f"{trail}/{name}", module, tensor
    for name, child in module.named_children():
        yield from _tensors(child, f"{trail}/{name}:{type(child).__name__}")


def _part_of(trail: str) -> str:
    return next((part for part, pattern in _PART_OF_TRAIL if re.search(pattern, trail)), "other")


def _uses_in_layer(layer: "nn.Module", kind: str, top_k: Any) -> "list[_Use]":
    from torch import nn

    found = [(_part_of(trail), trail, owner, tensor) for trail, owner, tensor in _tensors(layer)]
    routers = [len(tensor) for part, *_, tensor in found if part == "router" and tensor.ndim == 2]
    stacks = {  # with a row per expert; an embedding only in Doge
        id(tensor): len(tensor)
        for part, _, owner, tensor in found
        if (part == "routed_experts" and isinstance(owner, nn.Embedding))
        or (routers and part != "shared_experts" and tensor.ndim == 3 and not isinstance(owner, nn.Conv1d))
    }
    experts = [module for name, module in layer.named_modules() if name.rpartition(".")[2] == "experts"]
    lists = [len(module) for module in experts if isinstance(module, nn.ModuleList | nn.ModuleDict)]
    num_experts = max(list(stacks.values()) or lists or routers, default=0)
    is_sparse = bool(stacks) or any(part == "routed_experts" for part, *_ in found)
    uses = []
    for part, trail, owner, tensor in found:
        met = tensor.numel()
        if id(tensor) in stacks or part == "routed_experts":
            part, of = "routed_experts", stacks.get(id(tensor), num_experts)
            if not isinstance(top_k, int) or not 1 <= top_k <= of:
                raise ConfigError(
                    "--hf", f"a token meets {top_k} of {of} experts; set {_TOP_K[0]} or its like"
                )
            met = met * top_k // of
        elif part in ("router", "shared_experts") and not is_sparse:
            part = "dense_blocks"
        elif part == "attention" and kind == "linear_attention":
            part = "other"
        runs = part == "routed_experts" or not isinstance(owner, nn.Embedding)
        uses.append((part, trail, tensor, met, runs))
    return uses


def _uses_outside(model: "PreTrainedModel", trunk: "nn.Module", done: "set[nn.Module]") -> "list[_Use]":
    """Embeddings, final norm, head, towers; the embeddings first, because a tied head is counted there."""
    from torch import nn

    head, in_trunk = model.get_output_embeddings(), set(trunk.modules())
    has_towers = model.config.get_text_config() is not model.config
    uses = []
    for trail, owner, tensor in _tensors(model):
        part, is_table = "other", isinstance(owner, nn.Embedding)
        if owner is head:
            part = "head"
        elif owner in in_trunk and (is_table or _part_of(trail) == "norms"):
            part = "embedding" if is_table else "norms"
        runs = not is_table and (owner is head or owner in in_trunk or not has_towers)
        if owner not in done:
            uses.append((part, trail, tensor, tensor.numel(), runs))
    return sorted(uses, key=lambda use: use[0] != "embedding")


def _first(holder: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(holder, name, None)) is not None), None)


def _top_k(text: Any, index: int) -> Any:
    """Experts per token in a layer, None where the configuration does not say."""
    top_k = _first(text, _TOP_K) or _first(getattr(text, "ffn_config", None), _TOP_K)
    return top_k[index] if isinstance(top_k, list) else top_k


def _layer_kind(text: Any, index: int) -> str:
    if kinds := getattr(text, "layer_types", None):
        return kinds[index]
    return "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"


def _score_flops(module: "nn.Module", text: Any, kind: str, seq_len: int) -> int:
    """Scores and weighted values of a module that is softmax attention, else 0."""
    qk_dim, v_dim = _first(module, ("qk_head_dim", *_HEAD_DIM)), _first(module, ("v_head_dim", *_HEAD_DIM))
    is_attention = re.search(r"(?<!Cross)(Attention|MLA)$", type(module).__name__)
    if not is_attention or qk_dim is None or kind == "linear_attention":
        return 0
    n_heads = _first(module, ("num_heads", "num_attention_heads", "n_heads")) or text.num_attention_heads
    flops = causal_attention_flops(n_heads, qk_dim, v_dim, seq_len)
    return flops * _pairs(text, kind, seq_len) // _pairs(text, "", seq_len)


def _pairs(text: Any, kind: str, seq_len: int) -> int:
    """Pairs of a query and a key that it meets, in one sequence."""
    if "chunked" in kind:
        whole, rest = divmod(seq_len, chunk := text.attention_chunk_size)
        return whole * chunk * (chunk + 1) // 2 + rest * (rest + 1) // 2
    window = text.sliding_window if "sliding" in kind else seq_len
    if "indexed" in kind:
        window = _first(text, ("index_topk", "indexer_budget"))
    if window < 1:
        raise ConfigError("--hf", f"a window of {window} keys has none; set sliding_window or index_topk")
    window = min(window, seq_len)
    return window * (window + 1) // 2 + (seq_len - window) * window


def _count_deepseek(values: dict[str, Any], name: str, seq_len: int) -> ModelCounts:
    """DeepSeek-MoE, as our own configuration: transformers does not have it. Defaults are its own."""
    if values.get("moe_layer_freq", 1) != 1:
        raise ConfigError("--hf", "deepseek models have moe_layer_freq 1; count a deepseek_v2 or deepseek_v3")
    model = {
        "d_model": values["hidden_size"],
        "n_layers": values["num_hidden_layers"],
        "n_heads": values["num_attention_heads"],
        "n_kv_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
        "d_ff": values["intermediate_size"],
        "max_seq_len": seq_len,
        "tie_embeddings": values.get("tie_word_embeddings", False),
        "vocab_size": values["vocab_size"],
    }
    moe = {
        "num_experts": values["n_routed_experts"],
        "top_k": values["num_experts_per_tok"],
        "d_ff_expert": values["moe_intermediate_size"],
        "num_shared_experts": values.get("n_shared_experts") or 0,
        "normalize_gate_weights": False,
        "first_dense_layers": values.get("first_k_dense_replace", 0),
    }
    return replace(
        count_parameters(parse_config({"model": model, "moe": moe, "data": {"seq_len": seq_len}})), name=name
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings and progress bars of transformers and of the hub client off the screen."""
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
