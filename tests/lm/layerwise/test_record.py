"""Decoders are taken apart where nothing is computed between their layers, and refused elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_cache.lm.layerwise.passes import LayerPasses
from dpo_cache.lm.layerwise.record import (
    Layers,
    NotLayerMajorError,
    find_layers,
    finish,
    outermost_layers,
    record,
    watch_layers,
)
from dpo_cache.lm.layerwise.states import DeviceStates
from dpo_cache.lm.layerwise.weights import ResidentWeights
from tests.lm.layerwise.policies import policy_of, run_of, two_pieces
from tests.lm.layerwise.test_passes import largest_gap, row_arguments, take_gradients

WIDTH, NUM_LAYERS = 6, 3


class Layer(GradientCheckpointingLayer):
    """Adds a product of its input, and of everything else that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, *others: torch.Tensor | None) -> Any:
        for other in others:
            hidden = hidden if other is None else hidden + other.sin()
        return hidden + self.linear(hidden).tanh()


class Decoder(nn.Module):
    """Calls its layers by `walk(self, hidden)`; what that returns goes to the norm."""

    def __init__(self, walk: Callable[..., Any], layer: type[nn.Module] = Layer):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList([layer() for _ in range(NUM_LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.walk = walk

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.norm(self.walk(self, self.embedding(ids))),)


def arguments_of(seed: int) -> dict[str, Any]:
    return {"ids": (torch.arange(7 + seed) * (seed + 3) % 20)[None]}


def taken_apart(decoder: nn.Module) -> Layers:
    with torch.no_grad():
        return watch_layers(decoder, decoder, arguments_of(0))[0]


def check_gradients(decoder: nn.Module) -> Layers:
    """The decoder layer by layer equals the plain one for three inputs, gradients too."""
    layers = taken_apart(decoder)
    expected = [decoder(**arguments_of(seed))[0] for seed in range(3)]
    torch.stack([one.sin().sum() for one in expected]).sum().backward()
    own = take_gradients(decoder)
    run = LayerPasses(layers, ResidentWeights(), DeviceStates())
    run.forward([arguments_of(seed) for seed in range(3)])
    for place, one in enumerate(expected):
        output = run.finish(place)[0]
        torch.testing.assert_close(output, one, rtol=1e-6, atol=1e-6)
        output.sin().sum().backward()
        run.end_top(place)
    run.backward(lambda _: None)
    assert largest_gap(take_gradients(decoder), own) < 1e-5
    return layers


class PairLayer(Layer):
    """Returns a second tensor, made of the one that it is given; the first layer is given none."""

    def forward(self, hidden: torch.Tensor, other: torch.Tensor | None = None, **_: Any) -> Any:
        after = super().forward(hidden, other)
        return after, after.cos() if other is None else other * after.cos()


class MarkedLayer(Layer):
    """Returns what nobody needs, and its input unchanged in a list."""

    def forward(self, hidden: torch.Tensor, *others: torch.Tensor | None) -> Any:
        return [super().forward(hidden, *others), hidden.cos()]


def plain_walk(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    for layer in self.layers:
        hidden = layer(hidden)
    return hidden


def walk_with_first(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    first = hidden  # the very tensor that the first layer is given
    for layer in self.layers:
        hidden = layer(hidden, first)
    return hidden


def walk_with_state_twice(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    for layer in self.layers:
        hidden = layer(hidden, hidden)
    return hidden


def walk_with_parameter(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    for layer in self.layers:
        hidden = layer(hidden, self.norm.weight)
    return hidden


def walk_by_pairs(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    other = None
    for layer in self.layers:
        hidden, other = layer(hidden, other)
    return hidden


def walk_by_named_pairs(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    other = None
    for layer in self.layers:
        hidden, other = layer(hidden, other=other)
    return hidden


def walk_by_lists(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    for layer in self.layers:
        hidden = layer(hidden)[0]
    return hidden


def walk_twice(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    return plain_walk(self, plain_walk(self, hidden))


def walk_with_embedding_at_the_top(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    return plain_walk(self, hidden) + hidden


class PlainLayer(nn.Module):
    """A layer that its code does not mark."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.linear(hidden).tanh()


@pytest.mark.parametrize(
    ("walk", "kind"),
    [
        (plain_walk, Layer),
        (plain_walk, PlainLayer),
        (walk_with_first, Layer),
        (walk_with_state_twice, Layer),
        (walk_with_parameter, Layer),
        (walk_by_pairs, PairLayer),
        (walk_by_named_pairs, PairLayer),
        (walk_by_lists, MarkedLayer),
        (walk_twice, Layer),
        (walk_with_embedding_at_the_top, Layer),
    ],
)
def test_a_decoder_runs_layer_by_layer_with_the_same_gradients(walk: Any, kind: type) -> None:
    check_gradients(Decoder(walk, kind))


def test_what_a_layer_hands_on_is_known_by_its_place() -> None:
    layers = taken_apart(Decoder(walk_by_pairs, PairLayer))
    assert layers.takes == [{}, {0: 1}, {0: 1}]
    assert [layers.hands_on(place) for place in range(3)] == [{1}, {1}, set()]
    assert taken_apart(Decoder(walk_by_named_pairs, PairLayer)).takes == [{}, {"other": 1}, {"other": 1}]
    assert taken_apart(Decoder(walk_by_lists, MarkedLayer)).takes == [{}, {}, {}]  # dropped


class InPlaceLayer(Layer):
    def forward(self, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        return hidden.mul_(2)


class AppendingLayer(Layer):
    def forward(self, hidden: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
        kept.append(hidden)
        return super().forward(hidden, *kept[:-1])


class WritingLayer(Layer):
    def forward(self, hidden: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        total += 1
        return super().forward(hidden, total)


class NamedLayer(Layer):
    def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": super().forward(hidden)}


def walk_with_change(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    for layer in self.layers:
        hidden = layer(hidden) * 2
    return hidden


def walk_with_change_in_place(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    for layer in self.layers:
        hidden = layer(hidden)
        hidden *= 2
    return hidden


def walk_with_skips(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    one = self.layers[0](hidden)
    return self.layers[2](self.layers[1](one), one)


def walk_with_list(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    for layer in self.layers:
        hidden = layer(hidden, kept)
    return hidden


def walk_with_total(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(WIDTH)
    for layer in self.layers:
        hidden = layer(hidden, total)
    return hidden


def walk_with_cache(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    cache = DynamicCache()
    for layer in self.layers:
        hidden = layer(hidden, cache)
    return hidden


def walk_to_both(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    other = None
    for layer in self.layers:
        hidden, other = layer(hidden, other)
    return hidden + other


def walk_by_names(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    for layer in self.layers:
        hidden = layer(hidden)["hidden"]
    return hidden


def walk_past(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    return hidden


@pytest.mark.parametrize(
    ("walk", "kind", "reason"),
    [
        (walk_with_change, Layer, "its code changes the hidden states before a Layer"),
        (walk_with_change_in_place, Layer, "its code changes the hidden states before a Layer"),
        (walk_with_skips, Layer, "a Layer is given the output of an earlier layer"),
        (plain_walk, InPlaceLayer, "a InPlaceLayer changes its arguments"),
        (walk_with_total, WritingLayer, "a WritingLayer changes its arguments"),
        (walk_with_list, AppendingLayer, "a AppendingLayer changes its arguments"),
        (walk_with_cache, Layer, "a Layer keeps keys and values or a state in a cache"),
        (walk_to_both, PairLayer, "its code reads more of its layers than their state"),
        (walk_by_names, NamedLayer, "NamedLayer does not return its hidden states first"),
        (walk_past, Layer, "Decoder calls none of its layers"),
    ],
)
def test_a_decoder_is_refused(walk: Any, kind: type, reason: str) -> None:
    with pytest.raises(NotLayerMajorError, match=reason):
        taken_apart(Decoder(walk, kind))


def test_a_decoder_without_layers_is_refused() -> None:
    decoder = Decoder(walk_past)
    decoder.layers = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(NotLayerMajorError, match="Decoder has no layers that can be recognised"):
        taken_apart(decoder)


def test_other_calls_than_before_are_refused() -> None:
    decoder = Decoder(plain_walk)
    layers = taken_apart(decoder)
    for walk, reason in (
        (walk_with_change, "changes the hidden states"),
        (lambda self, hidden: self.layers[1](hidden), "called in another order"),
        (lambda self, hidden: self.layers[0](hidden), "1 layers were called, 3 before"),
        (walk_twice, "called in another order"),
    ):
        decoder.walk = walk
        with pytest.raises(NotLayerMajorError, match=reason):
            record(layers, **arguments_of(0))


def test_a_gradient_that_stops_between_layers_is_refused() -> None:
    """Without gradients, nothing shows: a detached tensor is a slice of all of its source."""
    decoder = Decoder(plain_walk)
    layers = taken_apart(decoder)

    def walk(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden).detach()
        return hidden

    decoder.walk = walk
    with torch.no_grad():
        record(layers, **arguments_of(0))
    with pytest.raises(NotLayerMajorError, match="changes the hidden states"):
        record(layers, **arguments_of(0))


def test_the_model_is_as_before() -> None:
    """Forwards of layers are their class's again, after an error as well."""
    decoder = Decoder(walk_with_change)
    with pytest.raises(NotLayerMajorError):
        taken_apart(decoder)
    decoder.walk = plain_walk
    layers = taken_apart(decoder)
    record(layers, **arguments_of(0))
    assert all("forward" not in layer.__dict__ for layer in decoder.layers)


def test_tensors_of_inference_mode() -> None:
    decoder = Decoder(plain_walk)
    with torch.inference_mode():
        layers = watch_layers(decoder, decoder, arguments_of(0))[0]
        found = record(layers, **arguments_of(1))
        state = found.state
        for call in found.calls:
            state = call.run(state)
        assert torch.equal(finish(layers, state, **arguments_of(1))[0], decoder(**arguments_of(1))[0])


def test_the_longest_list_of_modules_of_one_class_are_layers() -> None:
    decoder = Decoder(plain_walk, PlainLayer)
    decoder.heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    decoder.mixed = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.ReLU(), nn.ReLU()])
    assert outermost_layers(decoder) == [*decoder.layers]


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("family", ["openai-gpt", "glm_moe_dsa", "zaya", "falcon_h1", "bloom"])
def test_families_whose_layers_return_more(family: str) -> None:
    """Lists, indices of keys, states of routers, states, and weights of attention that nobody reads."""
    policy, pieces = policy_of(family), two_pieces()
    plain = policy(pieces)
    torch.stack([logps.sums().sin().sum() for logps in plain]).sum().backward()
    expected = take_gradients(policy.model)
    run = run_of(policy)
    run.forward(pieces)
    for place, one in enumerate(plain):
        logps = run.logps(place)
        torch.testing.assert_close(logps.tokens_T, one.tokens_T, rtol=1e-6, atol=1e-6)
        logps.sums().sin().sum().backward()
        run.end_top(place)
    run.backward(lambda _: None)
    assert largest_gap(take_gradients(policy.model), expected) < 1e-6


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_hidden_states_of_all_layers_may_be_asked_for() -> None:
    """The recorders are seen by the hooks that collect them; they change nothing."""
    model = policy_of("falcon").model
    with torch.no_grad():
        plain = model.transformer(**row_arguments(0), output_hidden_states=True)
        layers = find_layers(model, **row_arguments(0), output_hidden_states=True)
        found = record(layers, **row_arguments(0), output_hidden_states=True)
        state = found.state
        for call in found.calls:
            state = call.run(state)
        assert torch.equal(finish(layers, state, **row_arguments(0))[0], plain[0])
