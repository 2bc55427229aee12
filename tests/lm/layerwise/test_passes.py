"""Layer-major passes equal the plain forward and backward pass: hidden states to the bit, gradients by tensor."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.forest.attention import use_forest_attention
from dpo_cache.lm.forest.layout import build_forest
from dpo_cache.lm.forest.plans import plan_tree
from dpo_cache.lm.layerwise.passes import BOTTOM, LayerPasses
from dpo_cache.lm.layerwise.record import NotLayerMajorError, find_layers
from dpo_cache.lm.layerwise.shared import Leaves, SharedTensors
from dpo_cache.lm.layerwise.states import DeviceStates, HostStates
from dpo_cache.lm.layerwise.weights import ResidentWeights
from dpo_cache.lm.model.parts import decoder_of
from dpo_cache.types import Completion
from tests.families.tiny import make_tiny

# tied head, learned positions and Conv1D, experts, inputs of each layer and shared keys, layers that are called
# twice, soft caps, norms on both sides, slices between layers
FAMILIES = ("llama", "gpt2", "mixtral", "gemma3n_text", "zamba2", "gemma2", "glm4", "gemma4_text")


def forest_arguments(seed: int) -> dict[str, Any]:
    prompt = [3 + (seed * 7 + place) % 250 for place in range(12)]
    answers = ([5 + seed, 9, 30, 7], [5 + seed, 11, 12])
    forest = build_forest(
        [Completion(np.array(prompt, np.int32), np.array(answer, np.int32)) for answer in answers]
    )
    return {
        "input_ids": torch.from_numpy(forest.tokens_L)[None],
        "position_ids": torch.from_numpy(forest.depths_L)[None],
        "use_cache": False,
        "forest_plan": plan_tree(forest),
    }


def row_arguments(seed: int) -> dict[str, Any]:
    ids = forest_arguments(seed)["input_ids"].repeat(2, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def make(family: str) -> tuple[PreTrainedModel, Callable[[int], dict[str, Any]]]:
    """A tiny model in eval mode, and what makes the arguments of its passes."""
    torch.manual_seed(0)
    model = make_tiny(family).eval()
    if family in ("falcon", "zamba2"):
        return model, row_arguments
    assert use_forest_attention(model)
    return model, forest_arguments


def loss_of(hidden: torch.Tensor, number: int) -> torch.Tensor:
    return (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum() * (number + 1)


def plain(model: PreTrainedModel, arguments: Callable[[int], dict[str, Any]]) -> list[torch.Tensor]:
    """The hidden states of three passes; the gradients of their losses are left in the parameters."""
    found = [decoder_of(model)(**arguments(seed))[0] for seed in range(3)]
    torch.stack([loss_of(hidden, number) for number, hidden in enumerate(found)]).sum().backward()
    return [hidden.detach() for hidden in found]


def take_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def largest_gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of the tensors, the largest relative difference; of tiny ones relative to the norm of all."""
    assert found.keys() == expected.keys()
    norm = max(float(one.norm()) for one in expected.values())
    return max(
        float((found[name] - one).norm() / (one.norm() + 1e-5 * norm)) for name, one in expected.items()
    )


class FakeTransfer:
    """A device and a host in the same memory, which forgets what it was not given back."""

    def __init__(self) -> None:
        self.num_fetched = self.num_waited = 0

    def to_host(self, content: torch.Tensor) -> torch.Tensor:
        return content.clone()

    def to_device(self, content: torch.Tensor) -> torch.Tensor:
        self.num_fetched += 1
        return content.clone()

    def wait(self, arriving: torch.Tensor) -> torch.Tensor:
        self.num_waited += 1
        return arriving


@pytest.mark.rotating(3)
@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("family", [*FAMILIES, "falcon"])
def test_passes_equal_the_plain_passes(family: str, place: str) -> None:
    model, arguments = make(family)
    with torch.no_grad():
        layers = find_layers(model, **arguments(0))
    hidden = plain(model, arguments)
    expected = take_gradients(model)
    transfer = FakeTransfer()
    passes = LayerPasses(
        layers, ResidentWeights(), DeviceStates() if place == "device" else HostStates(transfer)
    )
    passes.forward([arguments(seed) for seed in range(3)])
    for number in range(3):
        output = passes.finish(number)[0]
        assert torch.equal(output.detach(), hidden[number])
        loss_of(output, number).backward()
        passes.end_top(number)
    whole: list[int] = []
    passes.backward(whole.append)
    assert largest_gap(take_gradients(model), expected) < 1e-6
    assert whole == sorted(whole, reverse=True) and whole[-1] == BOTTOM
    assert transfer.num_fetched == transfer.num_waited  # each state is fetched once for each use


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_layers_are_whole_when_they_are_reported() -> None:
    model, arguments = make("llama")
    layers = find_layers(model, **arguments(0))
    plain(model, arguments)
    expected = take_gradients(model)
    passes = LayerPasses(layers, ResidentWeights(), DeviceStates())
    passes.forward([arguments(seed) for seed in range(3)])
    for number in range(3):
        loss_of(passes.finish(number)[0], number).backward()
    reported: dict[str, torch.Tensor] = {}

    def take(index: int) -> None:
        names = [name for name in expected if f"layers.{index}." in name]
        reported.update({name: model.get_parameter(name).grad.clone() for name in names})
        if index > 0:
            assert all(one.grad is None for one in layers.order[index - 1].parameters())

    passes.backward(take)
    assert len(reported) == sum(".layers." in name for name in expected)
    assert largest_gap(reported, {name: expected[name] for name in reported}) < 1e-6


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("trained", [[], [1], [0], [2], [0, 2], ["embed_tokens"], ["norm"]])
def test_the_backward_pass_ends_at_the_lowest_trained_layer(trained: list[int | str]) -> None:
    model = make_tiny("llama", num_hidden_layers=3).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f"layers.{one}." in name or f"model.{one}." in name for one in trained))
    layers = find_layers(model, **row_arguments(0))
    if trained:
        plain(model, row_arguments)
    expected = take_gradients(model)
    weights = CountedWeights()
    run = LayerPasses(layers, weights, DeviceStates())
    run.forward([row_arguments(seed) for seed in range(3)])
    for number in range(3):
        loss_of(run.finish(number)[0], number).backward()
        run.end_top(number)
    whole: list[int] = []
    weights.used.clear()
    run.backward(whole.append)
    assert whole == [2, 1, 0, BOTTOM]
    numbers = [one for one in trained if isinstance(one, int)]
    lowest = 0 if "embed_tokens" in trained else min(numbers, default=3)
    assert weights.used == [*range(lowest, 3)][::-1]
    if expected:
        assert largest_gap(take_gradients(model), expected) < 1e-6


class CountedWeights(ResidentWeights):
    def __init__(self) -> None:
        self.used: list[int] = []

    def use(self, index: int, *, then: int | None = None) -> AbstractContextManager[None]:
        self.used.append(index)
        return nullcontext()


@contextmanager
def dropped_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The gradients of what layers share are lost."""

    def forget(_: SharedTensors, __: Leaves) -> None:
        pass

    with monkeypatch.context() as patch:
        patch.setattr(SharedTensors, "collect", forget)
        yield


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_a_dropped_gradient_of_an_argument_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of gradients sees it: what layers share needs its gradient."""
    model, arguments = make("gemma3n_text")
    layers = find_layers(model, **arguments(0))
    plain(model, arguments)
    expected = take_gradients(model)
    with dropped_gradients(monkeypatch):
        passes = LayerPasses(layers, ResidentWeights(), DeviceStates())
        passes.forward([arguments(seed) for seed in range(3)])
        for number in range(3):
            loss_of(passes.finish(number)[0], number).backward()
        passes.backward(lambda _: None)
    found = take_gradients(model)
    lost = expected.keys() - found.keys()
    assert any("per_layer" in name for name in lost)
    assert largest_gap(found, {name: expected[name] for name in found}) > 1e-2


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("dory", "its code changes the hidden states before a DoryDecoderLayer"),
        ("xlm, causal", "its code changes the hidden states before a MultiHeadAttention"),
    ],
)
def test_a_decoder_that_cannot_be_taken_apart_is_refused(family: str, reason: str) -> None:
    model = make_tiny(family).eval()
    with torch.no_grad(), pytest.raises(NotLayerMajorError, match=reason):
        find_layers(model, **row_arguments(0))
