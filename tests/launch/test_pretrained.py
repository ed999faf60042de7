"""Hugging Face folders in and out: `transformers` itself says what the weights mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hethub.checkpoints.export import export_checkpoint, hugging_face_config, whole_weights
from hethub.checkpoints.store import open_checkpoint
from hethub.cost.shapes import Parameter
from hethub.errors import InputError
from hethub.launch.model import StageModel
from hethub.launch.pretrained import Pretrained, check_pretrained
from hethub.launch.worker import make_batches
from hethub.specs.layout import Share, Span
from hethub.specs.llama_config import RopeScaling
from hethub.specs.workload import Model
from tests.checkpoints.made import make_checkpoint
from tests.launch.pool import Pool
from tests.plan_strategies import compile_plan, six_plans, tiny_model

TOKENS = 6
PLANS = six_plans()
SCALED = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


def hugging_face(model: Model, seed: int = 0) -> LlamaForCausalLM:
    """A model of these sizes with random weights, norms too."""
    torch.manual_seed(seed)
    found = LlamaForCausalLM(LlamaConfig(**hugging_face_config(model, 64, "fp32")))
    with torch.no_grad():
        for weight in found.parameters():
            weight.normal_(1.0 if weight.dim() == 1 else 0.0, 0.1)
    return found.eval()


def log_probabilities(model: Model, source: Callable[[Parameter, Span], Tensor], tokens: Tensor) -> Tensor:
    """Of every next token at every place, (S, V): what our stage's loss is for each target in turn."""
    stage = StageModel(
        model,
        (0, model.layers + 2),
        Share(
            heads=(0, model.heads),
            kv=(0, model.kv_heads),
            ffn=(0, model.ffn_size),
            vocab=(0, model.vocab_size),
        ),
        sequence_length=len(tokens),
        dtype=torch.float32,
        device=torch.device("cpu"),
        weights=source,
    )
    found = torch.empty(len(tokens), model.vocab_size)
    with torch.no_grad():
        for target in range(model.vocab_size):
            for place in range(len(tokens)):
                weights = torch.zeros(1, len(tokens))
                weights[0, place] = 1.0
                targets = torch.full((1, len(tokens)), target)
                found[place, target] = -stage.forward(tokens[None], targets, weights)
    return found


def theirs(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(tokens[None]).logits[0].float(), -1)


MODELS = {
    "grouped heads, tied": tiny_model(layers=2, heads=8, kv_heads=4, tied=True),
    "a head of its own": tiny_model(layers=2, heads=4, kv_heads=2),
    "Llama 3's positions": Model(
        **{**{f: getattr(tiny_model(layers=2), f) for f in Model.__slots__}, "rope_scaling": SCALED}
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_transformers_gives_its_logits(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    original = hugging_face(model)
    original.save_pretrained(tmp_path)
    check_pretrained(tmp_path, model)
    tokens = torch.arange(TOKENS) * 7 % model.vocab_size
    source = Pretrained(tmp_path)
    ours = log_probabilities(model, source.weights, tokens)
    source.close()
    torch.testing.assert_close(ours, theirs(original, tokens), rtol=0, atol=1e-4)


def test_a_folder_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    model = MODELS["a head of its own"]
    hugging_face(model).save_pretrained(tmp_path / "one")
    hugging_face(model).save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    check_pretrained(tmp_path / "many", model)
    one, many = Pretrained(tmp_path / "one"), Pretrained(tmp_path / "many")
    whole = Parameter("lm_head.weight", (model.vocab_size, model.hidden_size), "vocab", 0, 1, (3,))
    assert torch.equal(one.weights(whole, (3, 40)), many.weights(whole, (3, 40)))


@pytest.mark.parametrize("plan", ["one device", "unequal heads", "everything uneven"])
def test_a_run_begins_with_the_weights_of_a_folder(pool: Pool, tmp_path: Path, plan: str) -> None:
    """Under any plan the first loss is that of `transformers` on the same rows."""
    original = hugging_face(PLANS[plan].workload.model)
    original.save_pretrained(tmp_path)
    trained = pool.train(PLANS[plan], 1, held_out_rows=0, initial_weights=tmp_path)
    inputs, targets = make_batches(trained.task).rows(0, 0, 8)
    with torch.no_grad():
        logits = original(torch.from_numpy(inputs)).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    assert trained.losses[0] == pytest.approx(float(expected), abs=1e-4)


def test_an_exported_checkpoint_is_the_same_model_to_transformers(tmp_path: Path) -> None:
    plan = PLANS["everything uneven"]
    path = make_checkpoint(tmp_path / "checkpoints", plan, compile_plan(plan), 5)
    export_checkpoint(path, tmp_path / "llama")
    weights = whole_weights(path, open_checkpoint(path))

    def source(parameter: Parameter, span: Span) -> Tensor:
        return torch.from_numpy(weights[parameter.name]).narrow(parameter.axis, span[0], span[1] - span[0])

    tokens = torch.arange(TOKENS) * 5 % plan.workload.model.vocab_size
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32).eval()
    ours = log_probabilities(plan.workload.model, source, tokens)
    # Weights of size 1 make logits of hundreds: relative to them.
    scale = float(theirs(loaded, tokens).abs().max())
    torch.testing.assert_close(ours, theirs(loaded, tokens), rtol=0, atol=1e-4 * max(1.0, scale))
    # And in again.
    check_pretrained(tmp_path / "llama", plan.workload.model)
    again = Pretrained(tmp_path / "llama")
    norm = Parameter("model.norm.weight", (plan.workload.model.hidden_size,), "none", 0, 1, (5,))
    assert np.array_equal(again.weights(norm, (0, 32)).numpy(), weights["model.norm.weight"])
    with pytest.raises(InputError, match="is there already"):
        export_checkpoint(path, tmp_path / "llama")


def test_a_folder_of_another_model_is_refused_by_the_first_tensor(tmp_path: Path) -> None:
    hugging_face(MODELS["a head of its own"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"embed_tokens\.weight is of shape \[64, 16\], .* has \[64, 32\]"):
        check_pretrained(tmp_path, MODELS["grouped heads, tied"])
    other = tiny_model(layers=3, heads=4, kv_heads=2)
    with pytest.raises(InputError, match=r"model\.layers\.2\.input_layernorm\.weight is absent"):
        check_pretrained(tmp_path, other)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"cos\nsystem\n(S'touch marker'\ntR."])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="no weights"):
        check_pretrained(tmp_path, MODELS["a head of its own"])


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other"}}))
    with pytest.raises(InputError, match="names a file outside"):
        check_pretrained(tmp_path, MODELS["a head of its own"])
