"""Hugging Face's config.json, Llama family: what is a `Model`, what changes nothing, what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hethub.specs.document import Key
from hethub.specs.nearest import unknown_name

__all__ = ["Model", "RopeScaling", "config_of", "model_from_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3's frequency scaling of rotary positions (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A transformer, sizes in elements.

    `llama`: root-mean-square norms, rotary positions, grouped-query attention (`kv_heads` divides `heads`), SwiGLU of
    `ffn_size` columns, no biases. `gpt` (GPT-2, OPT): layer norms with biases, a table of `positions` learned
    positions, one feed-forward column product, biases everywhere; predicted, not launched. No dropout; `tied` means
    that head and embedding are one weight.
    """

    name: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    tied: bool
    rope_theta: float
    norm_epsilon: float
    rope_scaling: RopeScaling | None
    family: Literal["llama", "gpt"] = "llama"
    positions: int = 0


Report = Callable[[tuple[Key, ...], str], None]
"""Takes the keys of a value and what is wrong with it."""

_LARGEST_SIZE = 2**31

# config.json's size keys and ours.
_SIZES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn_size",
    "vocab_size": "vocab_size",
}
_OPTIONAL_SIZES = {"num_key_value_heads": "kv_heads", "head_dim": "head_dim"}
_ROPE_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
_ROPE_KEYS = ("rope_type", "type", *_ROPE_FACTORS, "original_max_position_embeddings", "rope_theta")

# Keys with one value that this model family's code computes; any other value is another model.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "model_type": ("llama", "mistral"),
    "quantization_config": (None,),
}
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")

# Keys that change nothing of the training mathematics: names, token numbers, generation, loading, initial
# weights (ours are a function of seed and name) and the length that the model was first trained for.
_IGNORED = frozenset(
    (
        *(
            "_name_or_path",
            "name_or_path",
            "transformers_version",
            "torch_dtype",
            "dtype",
            "auto_map",
            "tokenizer_class",
        ),
        *(
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "unk_token_id",
            "sep_token_id",
            "decoder_start_token_id",
        ),
        *(
            "use_cache",
            "return_dict",
            "output_attentions",
            "output_hidden_states",
            "torchscript",
            "use_bfloat16",
        ),
        *(
            "initializer_range",
            "pretraining_tp",
            "max_position_embeddings",
            "max_sequence_length",
            "max_length",
        ),
        *(
            "attn_implementation",
            "_attn_implementation",
            "_attn_implementation_autoset",
            "chunk_size_feed_forward",
        ),
        *(
            "problem_type",
            "id2label",
            "label2id",
            "num_labels",
            "task_specific_params",
            "finetuning_task",
            "is_decoder",
        ),
        *("do_sample", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty", "length_penalty"),
    )
)

_READ = (
    *(
        "name",
        "architectures",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
    ),
    *_SIZES,
    *_OPTIONAL_SIZES,
    *_FIXED,
)


def model_from_config(config: Mapping[str, Any], name: str, report: Report) -> Model | None:
    """The model that `config`, the keys of a config.json, describes; None after a `report` of what is wrong.

    `name` is used where the mapping has no `name` of its own, which Hugging Face's files do not.
    """
    return _Reader(config, report).model(name)


def config_of(model: Model) -> dict[str, Any]:
    """The mapping that `model_from_config` reads back as an equal model; Llama's family only."""
    if model.family != "llama":
        raise ValueError(f"{model.name} is of the {model.family} family, which no plan file can hold")
    config: dict[str, Any] = {"name": model.name}
    config |= {key: getattr(model, ours) for key, ours in (_SIZES | _OPTIONAL_SIZES).items()}
    config |= {
        "tie_word_embeddings": model.tied,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
    }
    scaling = model.rope_scaling
    if scaling is not None:
        keys = (*_ROPE_FACTORS, "original_max_position_embeddings")
        config["rope_scaling"] = {"rope_type": "llama3", **{key: getattr(scaling, key) for key in keys}}
    return config


class _Reader:
    """Reads one config and remembers whether anything was wrong."""

    def __init__(self, config: Mapping[str, Any], report: Report) -> None:
        self.config = config
        self._report = report
        self.failed = False

    def refuse(self, keys: tuple[Key, ...], text: str) -> None:
        self.failed = True
        self._report(keys, text)

    def model(self, name: str) -> Model | None:
        self._refuse_other_models()
        sizes = {ours: self._size(key) for key, ours in _SIZES.items()}
        heads = sizes["heads"]
        kv_heads = self._size("num_key_value_heads", heads)
        head_dim = self._size("head_dim", sizes["hidden_size"] // heads)
        self._check_heads(sizes["hidden_size"], heads, kv_heads, head_dim)
        theta, scaling = self._rope()
        epsilon = self._number(("rms_norm_eps",), self.config.get("rms_norm_eps", 1e-6))
        tied = self.config.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            self.refuse(("tie_word_embeddings",), "expected true or false. Change it.")
        own = self.config.get("name", name)
        if not isinstance(own, str) or not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", own):
            self.refuse(("name",), "is not a name. Use 1 to 64 letters, digits, '.', '-' and '_'.")
        if self.failed:
            return None
        return Model(
            name=own,
            hidden_size=sizes["hidden_size"],
            layers=sizes["layers"],
            heads=heads,
            ffn_size=sizes["ffn_size"],
            vocab_size=sizes["vocab_size"],
            kv_heads=kv_heads,
            head_dim=head_dim,
            tied=tied,
            rope_theta=theta,
            norm_epsilon=epsilon,
            rope_scaling=scaling,
        )

    def _refuse_other_models(self) -> None:
        """Refuse what our model code does not compute, and keys that we do not know."""
        for key, value in self.config.items():
            if key in _FIXED:
                # False is 0 and 1 is True for `in`; types tell them apart.
                if not any(value == one and type(value) in (type(one), int, float) for one in _FIXED[key]):
                    wanted = " or ".join("null" if one is None else str(one).lower() for one in _FIXED[key])
                    self.refuse((key,), f"{_shown(value)} is not supported. Only {wanted} is.")
            elif "dropout" in key or key.endswith("_pdrop"):
                if value is None or isinstance(value, bool) or value != 0:
                    self.refuse((key,), f"Dropout must be 0, not {_shown(value)}. Set it to 0.")
            elif key == "architectures":
                if not isinstance(value, list) or not set(map(str, value)) <= set(_ARCHITECTURES):
                    self.refuse(
                        (key,), f"{_shown(value)} is not supported. Only {' or '.join(_ARCHITECTURES)} is."
                    )
            elif key not in _READ and key not in _IGNORED:
                self.refuse(
                    (key,), unknown_name("unknown key, which might change the model. Remove it", key, _READ)
                )

    def _size(self, key: str, default: int | None = None) -> int:
        """A positive whole number; 1 stands in for a wrong one, so that reading goes on."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if key not in self.config:
            self.refuse((key,), "required key is missing. Add it.")
        elif not isinstance(value, int) or isinstance(value, bool):
            self.refuse((key,), f"expected a whole number, got {_shown(value)}. Change it.")
        elif not 1 <= value < _LARGEST_SIZE:
            self.refuse((key,), f"{value} is not between 1 and {_LARGEST_SIZE - 1}. Change it.")
        else:
            return value
        return 1

    def _number(self, keys: tuple[Key, ...], value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self.refuse(keys, f"expected a number above 0, got {_shown(value)}. Change it.")
            return 1.0
        return float(value)

    def _check_heads(self, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        if self.failed:
            return
        if heads % kv_heads:
            self.refuse(
                ("num_key_value_heads",),
                f"{kv_heads} does not divide num_attention_heads, {heads}. Give a divisor of it.",
            )
        if self.config.get("head_dim") is None and hidden % heads:
            self.refuse(
                ("num_attention_heads",),
                f"{heads} does not divide hidden_size, {hidden}. Change one or give head_dim.",
            )
        elif head_dim % 2:
            self.refuse(
                ("head_dim" if "head_dim" in self.config else "num_attention_heads",),
                f"heads of {head_dim} elements cannot be rotated by halves. Make head_dim even.",
            )

    def _rope(self) -> tuple[float, RopeScaling | None]:
        """Base and scaling of the rotary positions, from either of Hugging Face's two ways to write them."""
        key = "rope_parameters" if self.config.get("rope_parameters") is not None else "rope_scaling"
        table = self.config.get(key)
        if table is not None and not isinstance(table, dict):
            self.refuse((key,), f"expected a mapping, got {_shown(table)}. Change it.")
            table = None
        table = table or {}
        place: tuple[Key, ...] = (key, "rope_theta") if "rope_theta" in table else ("rope_theta",)
        theta = self._number(place, table.get("rope_theta", self.config.get("rope_theta", 10000.0)))
        for inner in table:
            if inner not in _ROPE_KEYS:
                self.refuse((key, inner), unknown_name("unknown key", inner, _ROPE_KEYS))
        kind = table.get("rope_type", table.get("type", "default"))
        if kind == "default":
            return theta, None
        if kind != "llama3":
            self.refuse((key,), f"rope_type {_shown(kind)} is not supported. Only default and llama3 are.")
            return theta, None
        return theta, self._llama3(key, table)

    def _llama3(self, key: str, table: dict[str, Any]) -> RopeScaling | None:
        length = table.get("original_max_position_embeddings")
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            self.refuse(
                (key, "original_max_position_embeddings"), "expected a whole number above 0. Give it."
            )
            return None
        factors = {name: self._number((key, name), table.get(name)) for name in _ROPE_FACTORS}
        if not self.failed and factors["low_freq_factor"] >= factors["high_freq_factor"]:
            self.refuse((key, "low_freq_factor"), "is not below high_freq_factor. Give a smaller one.")
        return RopeScaling(**factors, original_max_position_embeddings=length)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)[:60]
