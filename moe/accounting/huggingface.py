"""Count any causal language model that transformers can build, from its `config.json`.

The model is built on the meta device, so no memory is allocated. The part of a tensor follows from the names
and classes of the modules around it and from its shape, so new models need no table here. Experts are stacked
tensors (E, ., .), lists of modules, or rows of one matrix. Conventions beyond those of `counts.py`:

- A router's correction bias counts, even if it is a buffer. A shared expert's gate belongs to that expert.
- Mixers without softmax (state spaces, linear attention, convolutions), vision and audio towers, and tensors
  that match no other part are `other`. Towers have no FLOPs, because text tokens do not pass through them.
- A query attends to fewer keys in a sliding window, a chunk, or sparse attention over `index_topk` keys. The
  scores that select those keys are not counted. Compressed keys (DeepSeek-V4) count in full.
"""

import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.accounting.counts import ModelCounts, count_parameters, in_order
from moe.config import ConfigError, parse_config

if TYPE_CHECKING:  # importing torch takes seconds, and counting a model of this library does not need it
    from torch import Tensor, nn

_PART_PATTERNS = (  # the first match wins; a path looks like /self_attn:MixtralAttention/q_proj:Linear/weight
    ("norms", r":\w*Norm\w*/\w+$"),
    ("shared_experts", r"/shared_(expert|mlp)"),
    ("router", r"/(\w*router\w*|gate):|(correction|expert)_bias$"),
    ("routed_experts", r":\w*Experts?\w*/|/experts:Module(List|Dict)/|:\w*MoE/\w+:Embedding/"),
    ("attention", r":\w*(Attention|MLA)/"),
    ("dense_blocks", r":\w*(MLP|FFN|FeedForward|Intermediate|Output)/|/fc[12]:"),
)
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_GIVE = "give a config.json, a folder with one, or the name of a model on the hub"
SEQ_LEN, _LONGEST = 4096, "max_position_embeddings"
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size")


def count_huggingface(source: str, seq_len: int | None = None) -> ModelCounts:
    """Count the parameters of a model, and the FLOPs per text token in a sequence.

    Args:
        source: a `config.json`, a folder with one, or the name of a model on the Hugging Face hub.
        seq_len: tokens per sequence; None: `SEQ_LEN`, or the model's `max_position_embeddings` if fewer.

    Raises:
        ConfigError: it is none of these, or not a causal language model that transformers can build.
    """
    fix = _GIVE
    disabled = logging.root.manager.disable
    logging.disable()  # with stderr, this hides the warnings and progress bars of transformers and the hub
    try:
        with redirect_stderr(io.StringIO()):
            file, name = _find(source)
            values = json.loads(file.read_text(encoding="utf-8"))
            fix = "give the config.json of a causal language model, or correct its fields"
            if values.get("model_type") == "deepseek":
                return _count_deepseek(values, name, seq_len or _length(values.get(_LONGEST)))
            model = _build(file, values.get("model_type"))
            longest = getattr(model.config.get_text_config(), _LONGEST, None)
            return _count(model, name, seq_len or _length(longest))
    except Exception as error:  # wrong fields can make a model's code raise any exception
        if isinstance(error, ConfigError) and error.key == "--hf":
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError("--hf", f"cannot count {source} ({reason}); {fix}") from None
    finally:
        logging.disable(disabled)


def _length(longest: int | None) -> int:
    """The tokens of a sequence, if nobody says how many."""
    return SEQ_LEN if longest is None else min(SEQ_LEN, longest)


def _find(source: str) -> tuple[Path, str]:
    """The `config.json` of a source, and the name to show."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    path = Path(source).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file() and (path.suffix == ".json" or source[:1] in "./~"):
        raise ConfigError("--hf", f"no such file: {path}; {_GIVE}")
    if path.is_file():
        return path, path.resolve().parent.name if path.name == "config.json" else path.stem
    cached = try_to_load_from_cache(source, "config.json") if source.count("/") == 1 else None
    if isinstance(cached, str):
        return Path(cached), source
    HfApi().model_info(source, timeout=20)  # fails at once, while the download would retry for 23 s
    return Path(hf_hub_download(source, "config.json")), source


def _build(file: Path, model_type: Any) -> Any:
    try:
        import torch
        import transformers
    except ImportError:
        raise ConfigError("--hf", "this needs transformers; pip install -e '.[hf]'") from None
    if model_type not in transformers.CONFIG_MAPPING:
        raise ConfigError("--hf", f"transformers has no model_type {model_type!r}; correct it or upgrade")
    config = transformers.AutoConfig.from_pretrained(file, trust_remote_code=False)
    is_multimodal = type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
    is_causal = is_multimodal or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder or not is_causal:
        raise ConfigError("--hf", f"a {model_type} is no causal language model; count one that is")
    auto = transformers.AutoModelForMultimodalLM if is_multimodal else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, trust_remote_code=False, attn_implementation="eager")


def _count(model: Any, name: str, seq_len: int) -> ModelCounts:
    text = model.config.get_text_config()
    trunk, layers = _find_layers(model)
    kinds = getattr(text, "layer_types", None)
    default = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    top_k = _first(text, _TOP_K) or _first(getattr(text, "ffn_config", None), _TOP_K)  # one, or one per layer
    groups, flops, idle = [], Counter(), 0
    for index, layer in layers:
        kind = kinds[index] if kinds else default
        groups.append(list(_uses_in_layer(layer, kind, top_k[index] if isinstance(top_k, list) else top_k)))
        flops["attention"] += sum(_score_flops(module, text, kind, seq_len) for module in layer.modules())
    inside = {module for _, layer in layers for module in layer.modules()}
    # Embeddings come first, so that a head tied to one of them counts as embedding.
    groups.append(sorted(_uses_outside(model, trunk, inside), key=lambda use: use[0] != "embedding"))
    counts = [Counter() for _ in groups]
    seen: set[int] = set()  # a tied tensor is counted once, but multiplies in every place
    for uses, sizes in zip(groups, counts, strict=True):
        for part, path, tensor, used, runs in uses:
            if runs and tensor.ndim >= 2 and "bias" not in path.rpartition("/")[2]:
                flops[part] += 2 * used
            if id(tensor) not in seen:
                seen.add(id(tensor))
                sizes[part] += tensor.numel()
                idle += tensor.numel() - used
    if not counts[-1]["embedding"]:
        raise ConfigError("--hf", f"{name} has no vocabulary or no width; correct its fields")
    by_part, by_layer = in_order(sum(counts, Counter())), tuple(map(in_order, counts[:-1]))
    return ModelCounts(name, seq_len, by_part, idle, in_order(flops), by_layer)


def _find_layers(model: Any) -> "tuple[nn.Module, list[tuple[int, nn.Module]]]":
    """The innermost module that holds the input embedding and the layers; and each layer with its index."""
    from torch import nn

    trunk, layers = model, []
    for module in model.modules():
        if model.get_input_embeddings() in set(module.modules()):
            outer = [child for name, child in module.named_modules() if not re.search(r"\.\d+(\.|$)", name)]
            stacks = [child for child in outer if isinstance(child, nn.ModuleList)]
            found = [pair for stack in stacks for pair in enumerate(stack) if list(pair[1].children())]
            trunk, layers = (module, found) if found else (trunk, layers)
    return trunk, layers


def _tensors(module: "nn.Module", prefix: str = "") -> "Iterator[tuple[str, str, nn.Module, Tensor]]":
    """Every parameter and every router bias: the part by its path, the path, its module, the tensor."""
    buffers = dict(module.named_buffers(recurse=False))
    for name, tensor in [*module.named_parameters(recurse=False), *buffers.items()]:
        path = f"{prefix}/{name}"
        part = next((part for part, pattern in _PART_PATTERNS if re.search(pattern, path)), "other")
        if name not in buffers or ("bias" in name and part == "router"):
            yield part, path, module, tensor
    for name, child in module.named_children():
        yield from _tensors(child, f"{prefix}/{name}:{type(child).__name__}")


def _uses_in_layer(layer: "nn.Module", kind: str, top_k: Any) -> Iterator[tuple[str, str, Any, int, bool]]:
    """Part, path and tensor, how many of its elements a token uses, whether text tokens pass through it."""
    from torch import nn

    found = list(_tensors(layer))
    routers = [len(tensor) for part, *_, tensor in found if part == "router" and tensor.ndim == 2]
    stacks = {  # tensors with a row per expert, which are embeddings only in Doge
        id(tensor): len(tensor)
        for part, _, owner, tensor in found
        if (part == "routed_experts" and isinstance(owner, nn.Embedding))
        or (routers and part != "shared_experts" and tensor.ndim == 3 and not isinstance(owner, nn.Conv1d))
    }
    experts = [module for name, module in layer.named_modules() if name.rpartition(".")[2] == "experts"]
    lists = [len(module) for module in experts if isinstance(module, nn.ModuleList | nn.ModuleDict)]
    num_experts = max(list(stacks.values()) or lists or routers, default=0)
    is_sparse = bool(stacks) or any(part == "routed_experts" for part, *_ in found)
    for part, path, owner, tensor in found:
        used = tensor.numel()
        if id(tensor) in stacks or part == "routed_experts":
            part, of = "routed_experts", stacks.get(id(tensor), num_experts)
            if not isinstance(top_k, int) or not 1 <= top_k <= of:
                raise ConfigError("--hf", f"a token uses {top_k} of {of} experts; set {_TOP_K[0]}")
            used = used * top_k // of
        elif part in ("router", "shared_experts") and not is_sparse:
            part = "dense_blocks"
        elif part == "attention" and kind == "linear_attention":
            part = "other"
        yield part, path, tensor, used, part == "routed_experts" or not isinstance(owner, nn.Embedding)


def _uses_outside(model: Any, trunk: "nn.Module", layers: "set[nn.Module]") -> Iterator[Any]:
    """The same for modules outside the layers: embeddings, final norm, head, towers."""
    from torch import nn

    head, in_trunk = model.get_output_embeddings(), set(trunk.modules())
    has_towers = model.config.get_text_config() is not model.config
    for part, path, owner, tensor in _tensors(model):
        is_table = isinstance(owner, nn.Embedding)
        inner = "embedding" if is_table else "norms" if part == "norms" else "other"
        part = "head" if owner is head else inner if owner in in_trunk else "other"
        runs = not is_table and (owner is head or owner in in_trunk or not has_towers)
        if owner not in layers:
            yield part, path, tensor, tensor.numel(), runs


def _first(holder: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(holder, name, None)) is not None), None)


def _score_flops(module: "nn.Module", text: Any, kind: str, seq_len: int) -> int:
    """FLOPs per token of softmax attention, `2 H (Q + V)` per key that a query attends to; else 0."""
    qk_dim, v_dim = _first(module, ("qk_head_dim", *_HEAD_DIM)), _first(module, ("v_head_dim", *_HEAD_DIM))
    is_attention = re.search(r"(?<!Cross)(Attention|MLA)$", type(module).__name__)
    if not is_attention or qk_dim is None or kind == "linear_attention":
        return 0
    n_heads = _first(module, ("num_heads", "num_attention_heads", "n_heads")) or text.num_attention_heads
    return 2 * n_heads * (qk_dim + v_dim) * _pairs(text, kind, seq_len) // seq_len


def _pairs(text: Any, kind: str, seq_len: int) -> int:
    """Number of pairs of a query and a key that it attends to, in one sequence."""
    if "chunked" in kind:
        whole, rest = divmod(seq_len, chunk := text.attention_chunk_size)
        return whole * chunk * (chunk + 1) // 2 + rest * (rest + 1) // 2
    window = text.sliding_window if "sliding" in kind else seq_len
    if "indexed" in kind:
        window = _first(text, ("index_topk", "indexer_budget"))
    if window < 1:
        raise ConfigError("--hf", f"a window of {window} keys is empty; set sliding_window or index_topk")
    window = min(window, seq_len)
    return window * (window + 1) // 2 + (seq_len - window) * window


def _count_deepseek(values: dict[str, Any], name: str, seq_len: int) -> ModelCounts:
    """Count DeepSeek-MoE as a configuration of this library, because transformers does not have it."""
    if values.get("moe_layer_freq", 1) != 1:
        raise ConfigError("--hf", "moe_layer_freq of a deepseek model should be 1; use deepseek_v2 or later")
    model = {"d_model": values["hidden_size"], "n_layers": values["num_hidden_layers"]}
    model |= {"n_heads": values["num_attention_heads"], "d_ff": values["intermediate_size"]}
    model |= {"n_kv_heads": values.get("num_key_value_heads") or values["num_attention_heads"]}
    model |= {"max_seq_len": seq_len, "vocab_size": values["vocab_size"]}
    model |= {"tie_embeddings": values.get("tie_word_embeddings", False)}
    moe = {"num_experts": values["n_routed_experts"], "d_ff_expert": values["moe_intermediate_size"]}
    moe |= {"top_k": values["num_experts_per_tok"], "num_shared_experts": values.get("n_shared_experts") or 0}
    moe |= {"first_dense_layers": values.get("first_k_dense_replace", 0), "normalize_gate_weights": False}
    config = parse_config({"model": model, "moe": moe, "data": {"seq_len": seq_len}})
    return replace(count_parameters(config), name=name)
