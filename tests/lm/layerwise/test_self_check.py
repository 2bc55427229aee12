"""The check of a layer-major run sees whatever such a run can lose, and nothing where it loses nothing."""

import re
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.gradient_sketches import TOLERANCES
from dpo_cache.lm.layerwise import passes
from dpo_cache.lm.layerwise.in_order import InOrder
from dpo_cache.lm.layerwise.passes import LayerPasses
from dpo_cache.lm.layerwise.record import LayerCall
from dpo_cache.lm.layerwise.routing import CapturedRouters
from dpo_cache.lm.layerwise.self_check import layer_major_problem
from dpo_cache.lm.layerwise.shared import SharedTensors
from dpo_cache.lm.layerwise.sources import HostWeights
from dpo_cache.lm.layerwise.states import DeviceStates
from dpo_cache.lm.layerwise.streamed import PersistentCopies, StreamedWeights
from dpo_cache.lm.layerwise.weights import ResidentWeights
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.lm.model.load import load_model
from dpo_cache.lm.policy import PolicyModel
from tests.families.tiny import make_tiny
from tests.lm.layerwise.policies import layers_of, policy_of
from tests.lm.layerwise.transfers import FakeTransfer

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT
CPU = torch.device("cpu")

# what is special about a model, and its family
FAMILIES = {
    "plain": "llama",
    "tied": "gemma2",
    "mixture": "mixtral",
    "inputs of each layer": "gemma3n_text",
    "tuples": "falcon_h1",
    "more than the state": "zaya",
    "learned positions": "gpt2",
    "layers called twice": "zamba2",
    "LoRA": "llama",
    "LoRA on experts": "mixtral",
    "4-bit": "llama",
}


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory):
    """The policies by what is special about them; each is made once."""
    made: dict[str, PolicyModel] = {}

    def policy(kind: str) -> PolicyModel:
        if kind not in made:
            model = None
            if kind.startswith("LoRA"):
                model = with_lora(make_tiny(FAMILIES[kind]).eval())
            if kind == "4-bit":
                pytest.importorskip("bitsandbytes")
                folder = str(tmp_path_factory.mktemp("quantized"))
                make_tiny("llama").save_pretrained(folder)
                model = with_lora(load_model(folder, dtype=torch.float32, device=CPU, quantize="4bit"))
            made[kind] = policy_of(FAMILIES[kind], with_routing=kind == "mixture", model=model)
        return made[kind]

    return policy


def with_lora(model: PreTrainedModel) -> PreTrainedModel:
    adapted = add_adapter(model, lora_config(2, None, "all-linear"), seed=0, log=lambda _: None)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def problem_of(policy: PolicyModel) -> str:
    routers = CapturedRouters(policy.model) if policy.with_routing else None
    return layer_major_problem(policy, layers_of(policy), ResidentWeights(), DeviceStates(), routers)


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are compared to the rounding of a sum's order."""
    monkeypatch.setitem(TOLERANCES, "fp32", (2e-6, 1e-8))


@pytest.mark.rotating(2)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_right_run_has_no_problem(policies, tight: None, kind: str) -> None:
    policy = policies(kind)
    assert problem_of(policy) == ""
    assert all(parameter.grad is None for parameter in policy.model.parameters())


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        (StreamedWeights, "plain"),
        (StreamedWeights, "inputs of each layer"),
        (StreamedWeights, "layers called twice"),
        (StreamedWeights, "4-bit"),
        (StreamedWeights, "LoRA on experts"),
        (PersistentCopies, "tied"),
    ],
)
def test_a_right_run_of_weights_that_travel_has_no_problem(
    policies, tight: None, weights: type, kind: str
) -> None:
    """The plain run finds them again in its backward pass: what it would read too late is NaN."""
    policy = policies(kind)
    layers = layers_of(policy)
    once = [*dict.fromkeys(layers.order)]
    with weights(policy.model, once, HostWeights(), CPU, transfer=FakeTransfer()) as streamed:
        in_order = InOrder(streamed, [once.index(layer) for layer in layers.order])
        assert layer_major_problem(policy, layers, in_order, DeviceStates()) == ""
        leaves = [leaf for key in (0, "bottom", "top") for leaf in streamed.leaves(key).values()]
        assert leaves and all(leaf.grad is None for leaf in leaves)


def test_mixed_precision(policies, monkeypatch: pytest.MonkeyPatch) -> None:
    model = policies("plain").model
    policy = PolicyModel(model, policies("plain").attention, precision="bf16-mixed")
    assert problem_of(policy) == ""
    count_twice(monkeypatch)
    assert problem_of(policy).startswith(GRADIENT)


def drop_arguments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SharedTensors, "collect", lambda *_: None)


def skip_layer(patch: pytest.MonkeyPatch) -> None:
    run = LayerCall.run

    def skipping(call: LayerCall, state: torch.Tensor) -> torch.Tensor:
        after = run(call, state)
        return state if call.layer is skipping.layer else after

    skipping.layer = None
    original = LayerPasses.forward

    def forward(self: LayerPasses, arguments: Any) -> None:
        skipping.layer = self.layers.order[-1]
        original(self, arguments)

    patch.setattr(LayerCall, "run", skipping)
    patch.setattr(LayerPasses, "forward", forward)


def skip_layer_backward(patch: pytest.MonkeyPatch) -> None:
    """The last layer of one pass has no gradient."""
    original = LayerPasses._layer_backward

    def skipping(self: LayerPasses, index: int, place: int, one: Any, **options: Any) -> None:
        if (index, place) != (len(self.layers) - 1, 1):
            return original(self, index, place, one, **options)
        one.inputs.pop()
        one.shared._contents.pop()

    patch.setattr(LayerPasses, "_layer_backward", skipping)


def count_twice(patch: pytest.MonkeyPatch) -> None:
    """The first layer of the second pass is counted twice."""
    original = LayerPasses._layer_backward

    def twice(self: LayerPasses, index: int, place: int, one: Any, **options: Any) -> None:
        if (index, place) != (0, 1):
            return original(self, index, place, one, **options)
        with patch.context() as inner:
            backward = passes._backward
            inner.setattr(
                passes, "_backward", lambda roots: backward([(root, 2 * grad) for root, grad in roots])
            )
            original(self, index, place, one, **options)

    patch.setattr(LayerPasses, "_layer_backward", twice)


def forget_bottom(patch: pytest.MonkeyPatch) -> None:
    """Of a tied weight, only the head's term is left."""
    patch.setattr(LayerPasses, "_bottom_backward", lambda *_: None)


def drop_routers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CapturedRouters, "roots", lambda _: [])


GRADIENT = "it gives another gradient than the plain run"
FAULTS = [
    *((count_twice, kind, GRADIENT) for kind in FAMILIES),
    (drop_arguments, "inputs of each layer", GRADIENT),
    (drop_arguments, "more than the state", GRADIENT),
    (drop_arguments, "layers called twice", GRADIENT),
    (skip_layer, "plain", "it gives other log-probs than the plain run"),
    (skip_layer, "tuples", "it gives other log-probs than the plain run"),
    (skip_layer_backward, "learned positions", GRADIENT),
    (skip_layer_backward, "4-bit", GRADIENT),
    (skip_layer_backward, "LoRA", GRADIENT),
    (forget_bottom, "tied", rf"{GRADIENT} \(.*embed_tokens.weight"),
    (forget_bottom, "learned positions", rf"{GRADIENT} \(.*w[tp]e.weight"),
    (drop_routers, "mixture", rf"{GRADIENT} \(.*gate.weight"),
]


@pytest.mark.rotating(3)
@pytest.mark.parametrize(("fault", "kind", "reason"), FAULTS)
def test_a_fault_is_seen(policies, monkeypatch: pytest.MonkeyPatch, fault, kind: str, reason: str) -> None:
    policy = policies(kind)
    fault(monkeypatch)
    found = problem_of(policy)
    assert re.match(reason, found), found
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_a_layer_that_keeps_something_for_the_next_one_is_seen() -> None:
    """Its values are those of another pass, because all passes go through the layer first."""
    policy = policy_of("llama")
    first, last = policy.model.model.layers

    def keep(_: Any, args: Any, output: torch.Tensor) -> None:
        first.kept = output.detach().mean()

    first.register_forward_hook(keep)
    last.register_forward_hook(lambda _, __, output: output + first.kept)
    assert problem_of(policy).startswith("it gives other log-probs than the plain run")


def test_a_gradient_that_grows_after_its_layer_is_left_is_seen() -> None:
    """The bottom reads a parameter of a layer."""
    policy = policy_of("llama")
    scale = policy.model.model.layers[1].input_layernorm.weight
    policy.model.model.embed_tokens.register_forward_hook(lambda _, __, output: output * scale)
    assert problem_of(policy) == (
        "the gradient of model.layers.1.input_layernorm.weight grows after its layer is left"
    )


def test_a_code_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("llama")
    layers = layers_of(policy)

    def fail(*_: Any) -> None:
        raise ValueError("no such shape\nand more")

    monkeypatch.setattr(LayerCall, "run", fail)
    problem = layer_major_problem(policy, layers, ResidentWeights(), DeviceStates())
    assert problem == "it fails (no such shape)"


def test_a_lack_of_memory_is_no_problem_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("llama")
    layers = layers_of(policy)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(LayerCall, "run", fail)
    with pytest.raises(torch.OutOfMemoryError):
        layer_major_problem(policy, layers, ResidentWeights(), DeviceStates())
