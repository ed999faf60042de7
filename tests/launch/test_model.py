"""The model against torch's own parts and against a plain Llama, and cut into stages and shares against itself."""

from __future__ import annotations

import itertools
import math
import threading

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hethub.launch.model import SoloGroup, StageModel, _CrossEntropy, _RMSNorm, _SwiGLU
from hethub.launch.weights import initial_weight
from hethub.specs.layout import Share
from hethub.specs.workload import Model
from tests.plan_strategies import SEQUENCE, VOCABULARY, tiny_model

ROWS = 3


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def stage(model: Model, layers=None, share=None, group=None, dtype=torch.float64) -> StageModel:
    return StageModel(
        model,
        layers or (0, model.layers + 2),
        share or Share.whole(model),
        sequence_length=SEQUENCE,
        dtype=dtype,
        device=torch.device("cpu"),
        weights=lambda p, span: 5 * torch.from_numpy(initial_weight(p, span, model, 1)),
        group=group,
    )


def batch() -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (ROWS, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:], torch.tensor([1.0, 0.0, 1.0])


# -- functions with a backward of their own -----------------------------------------------------------------


def test_the_norm_and_its_gradients_are_torchs():
    x, w = normal(4, 3, 6), normal(6)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-5), (x, w))
    torch.testing.assert_close(_RMSNorm.apply(x, w, 1e-5), F.rms_norm(x, (6,), w, 1e-5))


def test_swiglu_and_its_gradients_are_torchs():
    gate, up = normal(4, 6), normal(4, 6)
    assert torch.autograd.gradcheck(_SwiGLU.apply, (gate, up))
    torch.testing.assert_close(_SwiGLU.apply(gate, up), F.silu(gate) * up)


def test_the_loss_and_its_gradients_are_torchs():
    logits, targets, weights = normal(5, 7), torch.tensor([0, 6, 3, 3, 1]), torch.rand(5, dtype=torch.float64)

    def loss(logits: Tensor) -> Tensor:
        return _CrossEntropy.apply(logits, targets, weights, 0, SoloGroup())

    assert torch.autograd.gradcheck(loss, (logits,))
    expected = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    torch.testing.assert_close(loss(logits), expected)


def test_the_loss_of_huge_logits_is_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = _CrossEntropy.apply(logits, torch.tensor([1]), torch.ones(1), 0, SoloGroup())
    loss.backward()
    assert float(loss.detach()) == 2e4
    assert torch.isfinite(logits.grad).all()


# -- the whole model ----------------------------------------------------------------------------------------


def plain_loss(
    model: Model, w: dict[str, Tensor], tokens: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    """Llama as one writes it down: rotation of complex numbers, attention head by head."""
    x = w["model.embed_tokens.weight"][tokens]
    width, per_group = model.head_dim, model.heads // model.kv_heads
    frequency = model.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.outer(torch.arange(SEQUENCE), frequency))
    future = torch.triu(torch.full((SEQUENCE, SEQUENCE), -math.inf, dtype=torch.float64), 1)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.norm_epsilon).sqrt() * w[name]

    def rotated(x: Tensor) -> Tensor:
        z = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    for layer in range(model.layers):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (h @ w[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv")
        heads = []
        for head in range(model.heads):
            mine, theirs = (slice(n * width, (n + 1) * width) for n in (head, head // per_group))
            scores = (
                rotated(q[..., mine]) @ rotated(k[..., theirs]).transpose(1, 2) / math.sqrt(width) + future
            )
            heads.append(scores.softmax(-1) @ v[..., theirs])
        x = x + torch.cat(heads, -1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (h @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate.sigmoid() * gate * up) @ w[at + "mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight" if model.tied else "lm_head.weight"]
    logits = norm(x, "model.norm.weight") @ head.T
    each = -logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
    return (each.sum(1) * weights).sum()


MODELS = {
    "as many key-value heads as heads": tiny_model(),
    "grouped-query heads": tiny_model(heads=8, kv_heads=2),
    "one key-value head, tied": tiny_model(layers=2, kv_heads=1, tied=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_a_plain_llama(name):
    model, (tokens, targets, weights) = MODELS[name], batch()
    ours = stage(model)
    loss = ours.forward(tokens, targets, weights)
    expected = plain_loss(model, ours.parameters, tokens, targets, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    names = list(ours.parameters)
    gradients, wanted = (
        torch.autograd.grad(x, [ours.parameters[n] for n in names]) for x in (loss, expected)
    )
    for parameter, ours_, theirs in zip(names, gradients, wanted, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-8, atol=1e-12, msg=parameter)


@pytest.mark.parametrize("cuts", [(0, 1, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5)])
def test_stages_in_a_chain_are_the_whole_model(cuts):
    model, (tokens, targets, weights) = tiny_model(), batch()
    whole = stage(model)
    whole_loss = whole.forward(tokens, targets, weights)
    whole_loss.backward()
    x, parts = tokens, []
    for layers in itertools.pairwise(cuts):
        parts.append(stage(model, layers))
        x = parts[-1].forward(x, targets, weights)
    x.backward()
    assert x.detach() == whole_loss.detach()
    for part in parts:
        for name, weight in part.parameters.items():
            assert torch.equal(weight.grad, whole.parameters[name].grad)


def test_the_last_stage_wants_targets():
    with pytest.raises(ValueError, match="targets"):
        stage(tiny_model()).forward(batch()[0])


def test_a_model_in_bf16_takes_its_loss_in_fp64():
    tokens, targets, weights = batch()
    loss = stage(tiny_model(), dtype=torch.bfloat16).forward(tokens, targets, weights)
    exact = stage(tiny_model()).forward(tokens, targets, weights)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


# -- shares -------------------------------------------------------------------------------------------------


class ThreadGroup:
    """A tensor-parallel group whose members are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._given: dict[int, Tensor] = {}

    def _reduce(self, tensor: Tensor, combine) -> Tensor:
        me = threading.current_thread().name
        self._given[me] = tensor.detach().clone()
        self._barrier.wait()
        total = combine(torch.stack([self._given[name] for name in sorted(self._given)]))
        self._barrier.wait()
        tensor.detach().copy_(total)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, lambda all_: all_.sum(0))

    def max(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, lambda all_: all_.amax(0))


def test_uneven_shares_together_are_the_whole_model():
    model, (tokens, targets, weights) = tiny_model(), batch()
    whole = stage(model)
    expected = whole.forward(tokens, targets, weights)
    group, losses = ThreadGroup(2), {}
    shares = [
        Share(heads=(0, 3), kv=(0, 3), ffn=(0, 17), vocab=(0, 40)),
        Share(heads=(3, 4), kv=(3, 4), ffn=(17, 24), vocab=(40, 64)),
    ]

    def member(number: int) -> None:
        part = stage(model, share=shares[number], group=group)
        with torch.no_grad():
            losses[number] = float(part.forward(tokens, targets, weights))

    threads = [threading.Thread(target=member, args=(n,), name=str(n)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert losses[0] == losses[1] == pytest.approx(float(expected.detach()), rel=1e-12)
