"""Steps and scoring layer by layer on CUDA, as far as they run without values: forward, weights fetched from the host."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any
from unittest import mock

import pytest
import torch

from dpo_cache.lm.forest.attention import use_forest_attention
from dpo_cache.lm.layerwise import copies, transfer
from dpo_cache.lm.layerwise.policy import LayerMajorRun
from dpo_cache.lm.layerwise.record import find_layers
from dpo_cache.lm.layerwise.sources import HostWeights
from dpo_cache.lm.layerwise.states import states_on
from dpo_cache.lm.layerwise.streamed import StreamedWeights
from dpo_cache.lm.layerwise.weights import LayerWeights, ResidentWeights
from dpo_cache.lm.memory.recompute import decoder_layers
from dpo_cache.lm.policy import PolicyModel, decoder_pass
from dpo_cache.lm.self_check import AttentionChoice
from tests.conftest import make_completions
from tests.fake_cuda.fakes import Operators, fake_cuda, needs_cuda_build
from tests.lm.families import FAMILIES

pytestmark = needs_cuda_build
CUDA = torch.device("cuda")


class Inline:
    """In place of a thread, which has tensors with values."""

    def __init__(self, *_: Any):
        pass

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args))
        return done

    def shutdown(self, **_: Any) -> None:
        pass


def plain_copy(home: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """A parameter without values has a class of its own, and its copy is none of that class."""
    return view.detach().requires_grad_(home.requires_grad)


def policy_on(device: str, family: str, kernel: str) -> PolicyModel:
    with torch.device(device):
        model = FAMILIES[family]().eval()
    assert use_forest_attention(model)
    return PolicyModel(model, AttentionChoice("forest", "for the test", kernel=kernel))


def run_forward(policy: PolicyModel, weights: LayerWeights, place: str) -> Operators:
    """The operators of a step of two pieces, forward, and of the log-probs of the first."""
    completions = make_completions(num_prompts=3)
    pieces = [completions[:4], completions[4:]]
    with torch.no_grad():
        layers = find_layers(
            policy.model, **decoder_pass(policy.model, pieces[0], policy.attention).arguments
        )
    run = LayerMajorRun(policy, layers, weights, states_on(place, CUDA))
    with Operators() as operators:
        run.forward(pieces)
        with weights.use_top():
            logps = run.logps(0)
    assert logps.tokens_T.device.type == "cuda" and logps.tokens_T.requires_grad
    return operators


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize(
    ("family", "kernel"), [("llama", "varlen"), ("gemma2", "flex"), ("gpt2", "segments")]
)
def test_a_step_runs_layer_by_layer_without_waiting(family: str, kernel: str, place: str) -> None:
    with fake_cuda():
        assert run_forward(policy_on("cuda", family, kernel), ResidentWeights(), place).waits == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_fetched_without_waiting(family: str) -> None:
    with (
        fake_cuda(),
        mock.patch.object(transfer, "ThreadPoolExecutor", Inline),
        mock.patch.object(copies, "copy_of", plain_copy),
    ):
        policy = policy_on("cpu", family, "varlen")
        with StreamedWeights(policy.model, decoder_layers(policy.model), HostWeights(), CUDA) as weights:
            assert run_forward(policy, weights, "host").waits == []
            assert weights.ring.num_bytes > 0
