"""The architectures that are read and written: their configs and the names of their tensors."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from metaopt.errors import UserError
from metaopt.models import TransformerConfig
from metaopt.models.attention import RopeScaling
from metaopt.models.transformer import mlp_width
from metaopt.pretrained.layout import Layout

_LLAMA_LAYER = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "mlp_out": "mlp.down_proj",
}
_GPT2_LAYER = {
    "attention_norm": "ln_1",
    "qkv": "attn.c_attn",
    "attention_out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "up": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
}
LLAMA = Layout(
    {
        "embed": "model.embed_tokens",
        **{part: f"model.layers.{{}}.{name}" for part, name in _LLAMA_LAYER.items()},
        "final_norm": "model.norm",
        "head": "lm_head",
    },
    passed_over=("rotary_emb.inv_freq",),
)
GPT2 = Layout(
    {
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        **{part: f"transformer.h.{{}}.{name}" for part, name in _GPT2_LAYER.items()},
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    transposed=False,
    passed_over=(".attn.bias", ".attn.masked_bias"),
)
_GGUF_LAYER = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "attention_out": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "mlp_out": "ffn_down",
}
GGUF = Layout(
    {
        "embed": "token_embd",
        **{part: f"blk.{{}}.{name}" for part, name in _GGUF_LAYER.items()},
        "final_norm": "output_norm",
        "head": "output",
    },
    passed_over=("rope_freqs.weight",),
)
LAYOUTS = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "gpt2": GPT2}
"""By ``model_type`` of Hugging Face."""
GGUF_LAYOUTS = {"llama": GGUF._replace(neighbours=True), "qwen2": GGUF}
"""By ``general.architecture`` of GGUF."""

Found = Mapping[str, Any]


def from_huggingface(found: Found) -> TransformerConfig:
    """The config of a model from Hugging Face's ``config.json``.

    Raises:
      UserError: the architecture is not known, or has something that the transformer here has not.
    """
    kind = found.get("model_type")
    if kind not in LAYOUTS:
        raise UserError(f"architecture {kind!r} is not known here: {', '.join(LAYOUTS)} are")
    with _understood():
        return _from_gpt2(found) if kind == "gpt2" else _from_llama(found, kind)


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """What is missing in a config, or of another type than it should be, as a `UserError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the config is not understood ({type(error).__name__}: {error})") from None


def to_huggingface(config: TransformerConfig) -> dict[str, Any]:
    """What ``config.json`` says of a model; the inverse of `from_huggingface`.

    Raises:
      UserError: none of the known architectures is this one.
    """
    if not config.causal:
        raise _not_there("causal=False")
    return _to_gpt2(config) if config.norm == "layer" else _to_llama(config)


def _from_llama(found: Found, kind: str) -> TransformerConfig:
    _require(found, "hidden_act", "silu")
    heads = _number(found, "num_attention_heads")
    width, head_width = _number(found, "hidden_size"), found.get("head_dim")
    biases = {(False, False): "none", (True, False): "attention", (True, True): "all"}
    has = bool(found.get("attention_bias")), bool(found.get("mlp_bias"))
    if has not in biases:
        raise UserError("mlp_bias without attention_bias is not known here")
    _require(found, "use_sliding_window", False)  # of some layers alone
    rope = found.get("rope_parameters") or {}
    return TransformerConfig(
        vocab_size=_number(found, "vocab_size"),
        width=width,
        num_layers=_number(found, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=found.get("num_key_value_heads") or heads,
        head_width=None if head_width in (None, width / heads) else head_width,
        mlp_width=_number(found, "intermediate_size"),
        activation="swiglu",
        window=found.get("sliding_window") if kind == "mistral" else None,
        tie_head=found.get("tie_word_embeddings", False),
        rope_base=float(rope.get("rope_theta") or found.get("rope_theta") or 10_000.0),
        rope_scaling=_scaling(rope or found.get("rope_scaling") or {}),
        norm_epsilon=found.get("rms_norm_eps", 1e-6),
        biases="qkv" if kind == "qwen2" else biases[has],  # type: ignore[arg-type]
    )


def _scaling(found: Found) -> RopeScaling | None:
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(factor=float(found["factor"]))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=float(found["factor"]),
            low=float(found["low_freq_factor"]),
            high=float(found["high_freq_factor"]),
            original_length=int(found["original_max_position_embeddings"]),
        )
    raise UserError(f"rotary scaling {kind!r} is not known here: default, linear and llama3 are")


def _to_llama(config: TransformerConfig) -> dict[str, Any]:
    if config.activation != "swiglu" or config.positions != "rotary":
        raise _not_there("RMS norms without SwiGLU and rotary positions")
    kind = "qwen2" if config.biases == "qkv" else "mistral" if config.window else "llama"
    if config.window and kind == "qwen2":
        raise _not_there("a window with biases of queries, keys and values")
    if config.window and config.biases != "none":
        raise _not_there("a window with biases")
    found = {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": mlp_width(config),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_head,
        "sliding_window": config.window,
        "attention_bias": config.biases in ("attention", "all"),
        "mlp_bias": config.biases == "all",
    }
    if (scaling := config.rope_scaling) is not None:
        found["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            found["rope_scaling"] |= {
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
                "original_max_position_embeddings": scaling.original_length,
            }
    return found


def _from_gpt2(found: Found) -> TransformerConfig:
    for name, value in (
        ("activation_function", "gelu_new"),
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
    ):
        _require(found, name, value)
    width = _number(found, "n_embd")
    return TransformerConfig(
        vocab_size=_number(found, "vocab_size"),
        width=width,
        num_layers=_number(found, "n_layer"),
        num_heads=_number(found, "n_head"),
        mlp_width=found.get("n_inner") or 4 * width,
        tie_head=found.get("tie_word_embeddings", True),
        positions="learned",
        max_length=_number(found, "n_positions"),
        norm="layer",
        norm_epsilon=found.get("layer_norm_epsilon", 1e-5),
        biases="all",
    )


def _to_gpt2(config: TransformerConfig) -> dict[str, Any]:
    plain = (config.activation, config.positions, config.biases) == ("gelu", "learned", "all")
    square = config.kv_heads == config.num_heads and config.head_width is None
    if not plain or not square or config.window:
        raise _not_there("layer norms with anything but GPT-2's GELU, positions, biases and heads")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": mlp_width(config),
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": "gelu_new",
        "tie_word_embeddings": config.tie_head,
    }


def from_gguf(found: Found, names: set[str]) -> TransformerConfig:
    """The config of a model from the fields of a GGUF file.

    Args:
      found: fields by name.
      names: names of its tensors; a head that is the embedding has none of its own.

    Raises:
      UserError: see `from_huggingface`.
    """
    kind = found.get("general.architecture")
    if kind not in GGUF_LAYOUTS:
        raise UserError(f"architecture {kind!r} is not known here: {', '.join(GGUF_LAYOUTS)} are")
    own = {k.removeprefix(f"{kind}."): v for k, v in found.items() if k.startswith(f"{kind}.")}
    if own.get("rope.scaling.type", "none") not in ("none", "linear"):
        raise UserError(f"rotary scaling {own['rope.scaling.type']!r} is not known here")
    if "rope_freqs.weight" in names:
        raise UserError(
            "rotary factors of each frequency (rope_freqs) are not known in a GGUF file"
        )
    with _understood():
        return _from_gguf(kind, own, found, "output.weight" not in names)


def _from_gguf(kind: str, own: Found, found: Found, is_tied: bool) -> TransformerConfig:
    heads, width = _number(own, "attention.head_count"), _number(own, "embedding_length")
    head_width = own.get("attention.key_length") or width // heads
    if (turned := own.get("rope.dimension_count", head_width)) != head_width:
        raise UserError(
            f"of {head_width} features of a head {turned} are rotary: all or none is known here"
        )
    scaled = own.get("rope.scaling.type") == "linear"
    return TransformerConfig(
        vocab_size=len(found["tokenizer.ggml.tokens"]),
        width=width,
        num_layers=_number(own, "block_count"),
        num_heads=heads,
        num_kv_heads=own.get("attention.head_count_kv", heads),
        head_width=None if head_width == width / heads else head_width,
        mlp_width=_number(own, "feed_forward_length"),
        activation="swiglu",
        tie_head=is_tied,
        rope_base=float(own.get("rope.freq_base", 10_000.0)),
        rope_scaling=RopeScaling(factor=own["rope.scaling.factor"]) if scaled else None,
        norm_epsilon=float(own.get("attention.layer_norm_rms_epsilon", 1e-6)),
        biases="qkv" if kind == "qwen2" else "none",
    )


def _number(found: Found, name: str) -> int:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"the config says no number for {name!r}, but {value!r}")
    return value


def _require(found: Found, name: str, value: Any) -> None:
    if found.get(name, value) != value:
        raise UserError(f"{name} is {found[name]!r}, and only {value!r} is known here")


def _not_there(what: str) -> UserError:
    return UserError(f"no architecture of Hugging Face has {what}, so it cannot be exported")
