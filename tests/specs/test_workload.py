"""The workload: where its model comes from, which configs are of our family, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hethub.errors import InputError
from hethub.specs.base import validate_document
from hethub.specs.document import dump_yaml, parse_document
from hethub.specs.workload import (
    Model,
    RopeScaling,
    Workload,
    WorkloadSpec,
    resolve_workload,
    workload_to_spec,
)

# The keys that a Llama config.json of Hugging Face's carries, those that change nothing included.
CONFIG = {
    "_name_or_path": "some/where",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [1, 2],
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0",
    "use_cache": True,
    "vocab_size": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODEL = Model(
    name="tiny",
    hidden_size=64,
    layers=3,
    heads=8,
    kv_heads=4,
    head_dim=8,
    ffn_size=96,
    vocab_size=256,
    tied=True,
    rope_theta=10000.0,
    norm_epsilon=1e-5,
    rope_scaling=None,
)


def resolve(model, folder=Path()):
    content = {"model": model, "sequence_length": 32, "global_batch": 8, "precision": "fp32"}
    document = parse_document(dump_yaml(content), folder / "w.yaml")
    return resolve_workload(validate_document(document, WorkloadSpec), document)


def read(folder, config):
    """The model of a config.json in a folder called tiny, indented as Hugging Face writes it."""
    (folder / "tiny").mkdir(exist_ok=True)
    (folder / "tiny" / "config.json").write_text(json.dumps(config, indent=2))
    return resolve("tiny/config.json", folder).model


def test_a_config_json_is_found_beside_the_file_that_names_it(tmp_path):
    assert read(tmp_path, CONFIG) == MODEL
    assert resolve("./tiny", tmp_path).model == MODEL


def test_defaults_are_hugging_faces(tmp_path):
    left_out = ("num_key_value_heads", "tie_word_embeddings", "rope_theta", "rms_norm_eps", "architectures")
    model = read(tmp_path, {key: one for key, one in CONFIG.items() if key not in left_out})
    assert (model.kv_heads, model.tied, model.rope_theta, model.norm_epsilon) == (8, False, 10000.0, 1e-6)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama_3_scaling_is_read_in_both_ways_of_writing_it(tmp_path, key):
    model = read(tmp_path, {**CONFIG, key: {**LLAMA3, "rope_theta": 5e5}})
    assert model.rope_theta == 5e5
    assert model.rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


def test_a_shipped_model_is_found_whatever_the_case():
    assert resolve("LLaMA-7B").model.name == "llama-7b"


def test_a_model_may_be_written_in_place():
    assert resolve({**CONFIG, "name": "tiny"}).model == MODEL
    assert resolve(CONFIG).model.name == "custom"


REFUSED = {
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout: Dropout must be 0, not 0.1. Set it to 0."),
    "another dropout": ({"resid_pdrop": 0.1}, "resid_pdrop: Dropout must be 0"),
    "a hidden dropout": ({"hidden_dropout": 0.5}, "hidden_dropout: Dropout must be 0"),
    "bias": ({"attention_bias": True}, "attention_bias: true is not supported. Only false is."),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported. Only silu or swish is."),
    "another family": (
        {"model_type": "gpt2"},
        "model_type: 'gpt2' is not supported. Only llama or mistral is.",
    ),
    "another class": (
        {"architectures": ["OPTForCausalLM"]},
        "architectures: ['OPTForCausalLM'] is not supported",
    ),
    "a window": ({"sliding_window": 4096}, "sliding_window: 4096 is not supported. Only null is."),
    "experts": (
        {"num_local_experts": 8},
        "num_local_experts: unknown key, which might change the model. Remove it.",
    ),
    "a typing error": ({"rms_norm_epz": 1e-5}, 'Did you mean "rms_norm_eps"?'),
    "uneven groups": (
        {"num_key_value_heads": 3},
        "num_key_value_heads: 3 does not divide num_attention_heads, 8.",
    ),
    "uneven heads": ({"hidden_size": 65}, "num_attention_heads: 8 does not divide hidden_size, 65"),
    "odd heads": ({"head_dim": 7}, "head_dim: heads of 7 elements cannot be rotated by halves"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers: 0 is not between 1 and"),
    "half a layer": ({"num_hidden_layers": 2.5}, "num_hidden_layers: expected a whole number, got 2.5"),
    "text for a size": ({"vocab_size": "many"}, "vocab_size: expected a whole number, got 'many'"),
    "other scaling": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling: rope_type 'linear' is not",
    ),
    "scaling without factor": (
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "factor"}},
        "rope_scaling.factor: expected a number above 0, got null",
    ),
    "crossed factors": (
        {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
        "is not below high_freq_factor",
    ),
    "zero theta": ({"rope_theta": 0}, "rope_theta: expected a number above 0, got 0"),
    "tied to what": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_of_another_model_is_refused_with_its_line_and_key(tmp_path, case):
    change, text = REFUSED[case]
    config = {**CONFIG, **change}
    with pytest.raises(InputError) as caught:
        read(tmp_path, config)
    told = [one for one in caught.value.message.splitlines() if text in one]
    assert told, caught.value.message
    key = told[0].split(": ")[0].split()[-1].split(".")[-1]
    key = (
        key if f'"{key}"' in json.dumps(config) else "rope_scaling"
    )  # a missing key shows where it should stand
    lines = (tmp_path / "tiny" / "config.json").read_text().splitlines()
    line = next(number for number, one in enumerate(lines, 1) if f'"{key}"' in one)
    assert told[0].startswith(f"{tmp_path}/tiny/config.json:{line}:")


def test_a_missing_size_is_named(tmp_path):
    config = {key: one for key, one in CONFIG.items() if key != "intermediate_size"}
    with pytest.raises(InputError, match=r"config\.json:1:1 intermediate_size: required key is missing"):
        read(tmp_path, config)


def test_an_unknown_model_names_the_nearest_and_how_to_give_ones_own():
    with pytest.raises(InputError) as caught:
        resolve("lama-7b")
    assert caught.value.message.startswith(
        'w.yaml:1:1 model: "lama-7b" is not in the catalog. Did you mean "llama-7b"?'
    )
    assert "config.json" in caught.value.message


def test_a_missing_config_names_the_file(tmp_path):
    with pytest.raises(InputError, match=r"w\.yaml:1:1 model: there is no file .*nowhere/config\.json"):
        resolve("nowhere/config.json", tmp_path)


def test_an_inline_model_is_refused_at_its_own_line():
    with pytest.raises(InputError, match=r"w\.yaml:\d+:\d+ model\.hidden_act: 'relu' is not supported"):
        resolve({**CONFIG, "hidden_act": "relu"})


def test_zero_batches_and_unknown_keys_are_refused():
    text = "model: llama-7b\nsequence_length: 0\nglobal_batch: -1\nprecision: int8\nbatch: 3\n"
    document = parse_document(text, Path("w.yaml"))
    with pytest.raises(InputError) as caught:
        validate_document(document, WorkloadSpec)
    assert [line.split(":")[1] for line in caught.value.message.splitlines()] == ["2", "3", "4", "5"]


SIZES = st.integers(1, 8)


@st.composite
def workloads(draw):
    kv_heads, group = draw(SIZES), draw(SIZES)
    scaling = st.builds(
        RopeScaling,
        factor=st.floats(1, 64),
        low_freq_factor=st.floats(0.5, 1),
        high_freq_factor=st.floats(2, 8),
        original_max_position_embeddings=st.integers(1, 10_000),
    )
    model = Model(
        name=draw(st.from_regex("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)),
        hidden_size=draw(st.integers(1, 1000)),
        layers=draw(SIZES),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=2 * draw(SIZES),
        ffn_size=draw(st.integers(1, 1000)),
        vocab_size=draw(st.integers(1, 1000)),
        tied=draw(st.booleans()),
        rope_theta=draw(st.floats(1, 1e7)),
        norm_epsilon=draw(st.floats(1e-12, 1e-2)),
        rope_scaling=draw(st.none() | scaling),
    )
    return Workload(
        model=model,
        sequence_length=draw(SIZES),
        global_batch=draw(SIZES),
        precision="fp64",
        optimizer="adamw",
    )


@given(workloads())
def test_any_workload_written_out_loads_back_equal(workload):
    document = parse_document(dump_yaml({"workload": workload_to_spec(workload)}), Path("plan.yaml"))
    inner = parse_document(dump_yaml(workload_to_spec(workload)), Path("plan.yaml"))
    assert (
        resolve_workload(validate_document(inner, WorkloadSpec), document, prefix=("workload",)) == workload
    )
