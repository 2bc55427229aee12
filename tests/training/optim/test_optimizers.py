"""Every optimizer: state that comes back bit for bit, and updates one by one that equal updates at once."""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from dpo_cache.errors import OptionError, TrainingError
from dpo_cache.training.optim.optimizers import decayed_names, make_optimizer
from dpo_cache.training.optim.updates import Updater
from tests.families.tiny import FAMILIES, _build, make_config
from tests.rotation import is_in_part

OPTIMIZERS = [
    "adamw",
    "adamw-bf16",
    "adafactor",
    *(["adamw-8bit"] if importlib.util.find_spec("bitsandbytes") else []),
]
ROUNDED = ["nearest", "stochastic", "compensated"]
CASES = [(name, torch.float32, "auto") for name in OPTIMIZERS] + [
    (name, torch.bfloat16, rounding) for name in OPTIMIZERS for rounding in ROUNDED
]
each_case = pytest.mark.parametrize(
    ("name", "dtype", "rounding"), CASES, ids=lambda value: str(value).removeprefix("torch.")
)


class Small(torch.nn.Module):
    """A matrix large enough for 8-bit state, a bias, a norm, and a weight that is not always used."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"matrix": (70, 64), "bias": (64,), "norm": (70,), "expert": (8, 16)}
        for name, shape in shapes.items():
            self.register_parameter(
                name, torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype))
            )
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def give_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(100 + step)
        for name, parameter in self.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.requires_grad and not (name == "expert" and step % 2):
                parameter.grad = gradient


def make(name: str, dtype: torch.dtype, rounding: str, **changes: float) -> tuple[Small, Updater]:
    model = Small(dtype)
    options = {"lr": 1e-3, "weight_decay": 0.1, "seed": 5, **changes}
    return model, make_optimizer(model, name, **options, rounding=rounding)  # type: ignore[arg-type]


def train(model: Small, optimizer: Updater, steps: range) -> None:
    for step in steps:
        model.give_gradients(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        optimizer.step()
        optimizer.zero_grad()


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, left), right in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), name


@each_case
def test_a_state_that_was_saved_and_restored_goes_on_bit_for_bit(
    name: str, dtype: torch.dtype, rounding: str, tmp_path: Path
) -> None:
    straight, optimizer = make(name, dtype, rounding)
    train(straight, optimizer, range(6))
    stopped, before = make(name, dtype, rounding)
    train(stopped, before, range(3))
    save_file(before.tensors(), tmp_path / "state.safetensors")
    save_file(stopped.state_dict(), tmp_path / "weights.safetensors")
    resumed, after = make(name, dtype, rounding)
    resumed.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    after.restore(load_file(tmp_path / "state.safetensors"))
    assert after.tensors().keys() == before.tensors().keys()
    for key, value in before.tensors().items():
        assert torch.equal(after.tensors()[key], value) and after.tensors()[key].dtype == value.dtype, key
    train(resumed, after, range(3, 6))
    assert_same(resumed, straight)
    for key, value in optimizer.tensors().items():
        assert torch.equal(after.tensors()[key], value), key


@each_case
def test_updates_one_by_one_in_any_order_are_updates_at_once(
    name: str, dtype: torch.dtype, rounding: str
) -> None:
    together, optimizer = make(name, dtype, rounding)
    alone, one_by_one = make(name, dtype, rounding)
    train(together, optimizer, range(4))
    for step in range(4):
        alone.give_gradients(step)
        for group in one_by_one.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        for parameter in reversed(one_by_one.parameters):
            if parameter.grad is not None:
                one_by_one.update(parameter)
        one_by_one.zero_grad()
    assert_same(alone, together)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_spares_biases_and_norms(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        models = []
        for decay in (0.0, 0.5):
            model, optimizer = make(name, dtype, "nearest", weight_decay=decay)
            train(model, optimizer, range(4))
            models.append(model)
        plain, decayed = models
        assert torch.equal(plain.bias, decayed.bias) and torch.equal(plain.norm, decayed.norm)
        assert decayed.matrix.float().norm() < plain.matrix.float().norm() and torch.equal(
            plain.frozen, decayed.frozen
        )


def test_adamw_in_float32_is_torchs_own() -> None:
    model, optimizer = make("adamw", torch.float32, "auto")
    expected = Small(torch.float32)
    groups = [
        {"params": [expected.matrix, expected.expert], "weight_decay": 0.1},
        {"params": [expected.bias, expected.norm], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, fused=True)
    train(model, optimizer, range(5))
    for step in range(5):
        expected.give_gradients(step)
        for group in theirs.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        theirs.step()
        theirs.zero_grad()
    assert_same(model, expected)


@pytest.mark.parametrize("name", ["adamw-8bit", "adamw-bf16", "adafactor"])
def test_the_others_go_where_adamw_goes(name: str) -> None:
    """A constant gradient moves every weight by about the learning rate a step, whatever the optimizer."""
    if name not in OPTIMIZERS:
        pytest.skip("needs bitsandbytes")
    model, optimizer = make(name, torch.float32, "auto", weight_decay=0.0)
    start = model.matrix.detach().clone()
    for _ in range(10):
        for parameter in optimizer.parameters:
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
    moved = start - model.matrix.detach()
    assert torch.allclose(moved, torch.full_like(moved, 10e-3), rtol=0.05)
    state = optimizer.tensors()
    kept = sum(
        value.numel() * value.element_size() for key, value in state.items() if key.startswith("matrix/")
    )
    assert kept < {"adamw-8bit": 2.1, "adamw-bf16": 4.01, "adafactor": 0.15}[name] * model.matrix.numel()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_updates_are_lost_in_bfloat16_unless_rounding_is_stochastic_or_compensated(name: str) -> None:
    def run(dtype: torch.dtype, rounding: str) -> torch.Tensor:
        model, optimizer = make(name, dtype, rounding, lr=1e-6, weight_decay=0.0)
        # the same start in each dtype: values that bfloat16 can represent
        model.matrix.data.fill_(0.3).copy_(Small(torch.bfloat16).matrix)
        start = model.matrix.detach().clone()
        for step in range(40):
            generator = torch.Generator().manual_seed(step)
            gradient = 0.1 + 0.01 * torch.randn(model.matrix.shape, generator=generator)
            model.matrix.grad = gradient.bfloat16().to(dtype)
            optimizer.step()
        large = start.abs() > 0.05  # whose neighbours in bfloat16 are further away than all steps together
        return (model.matrix.detach().double() - start.double())[large]

    exact = run(torch.float32, "auto")
    assert exact.max() < -20e-6
    assert not run(torch.bfloat16, "nearest").any()
    drawn = run(torch.bfloat16, "stochastic")
    spread = drawn.std() / len(drawn) ** 0.5
    assert abs(drawn.mean() - exact.mean()) < 5 * spread and spread < abs(exact.mean()) / 5
    model, optimizer = make(name, torch.bfloat16, "compensated", lr=1e-6, weight_decay=0.0)
    exact_model, exact_optimizer = make(name, torch.float32, "auto", lr=1e-6, weight_decay=0.0)
    for one, other in zip(exact_model.parameters(), model.parameters(), strict=True):
        one.data.copy_(other)
    for step in range(10):
        model.give_gradients(step)
        for one, other in zip(exact_model.parameters(), model.parameters(), strict=True):
            one.grad = None if other.grad is None else other.grad.float()
        optimizer.step(), exact_optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(exact_model.parameters(), model.parameters(), strict=True):
        is_near = (one - other.float()).abs().max() <= one.abs().max() * 2**-8
        assert torch.equal(one.bfloat16(), other) or is_near  # ties may differ
    for entry, value in exact_optimizer.tensors().items():
        # the state is that of the float32 run, bit for bit
        assert torch.equal(optimizer.tensors()[entry], value), entry


def test_compensated_weights_with_their_rest_are_the_float32_weights() -> None:
    from dpo_cache.training.optim.rounding import join_float

    model, optimizer = make("adamw", torch.bfloat16, "compensated")
    exact, exact_optimizer = make("adamw", torch.float32, "auto")
    for one, other in zip(exact.parameters(), model.parameters(), strict=True):
        one.data.copy_(other)
    for step in range(8):
        model.give_gradients(step)
        for one, other in zip(exact.parameters(), model.parameters(), strict=True):
            one.grad = None if other.grad is None else other.grad.float()
        optimizer.step(), exact_optimizer.step()
        optimizer.zero_grad(), exact_optimizer.zero_grad()
    state = optimizer.tensors()
    for name in ("matrix", "bias", "norm", "expert"):
        assert torch.equal(
            join_float(getattr(model, name).detach(), state[f"{name}/rest"]), getattr(exact, name).detach()
        ), name


def test_nothing_is_held_for_a_stand_in_between_updates() -> None:
    model, optimizer = make("adamw", torch.bfloat16, "stochastic")
    train(model, optimizer, range(2))
    assert all(slot.leaf.numel() == 0 and slot.leaf.grad is None for slot in optimizer._slots)
    assert [group["params"] for group in optimizer.param_groups] == [
        [slot.leaf for slot in optimizer._slots if slot.name in ("matrix", "expert")],
        [slot.leaf for slot in optimizer._slots if slot.name in ("bias", "norm")],
    ]


@pytest.mark.parametrize("name", ["adamw-paged", "adamw-8bit-paged"])
def test_paged_state_needs_cuda(name: str) -> None:
    with pytest.raises(
        OptionError,
        match=f"`optimizer` {name}: pages move between a CUDA GPU and its host, and the policy is on cpu",
    ):
        make(name, torch.float32, "auto")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(
        OptionError,
        match=r"`optimizer` adamw-8bit needs bitsandbytes and accelerate, which are not .*\nRun `pip install 'dpo-cache\[quantize\]'`",
    ):
        make("adamw-8bit", torch.float32, "auto")


def test_the_state_of_other_weights_is_refused() -> None:
    _, optimizer = make("adamw", torch.float32, "auto")
    with pytest.raises(TrainingError, match="state for 1 weights that are not trained now, first lora_A"):
        optimizer.restore({"lora_A/step": torch.tensor(1.0)})


# -- which weights are decayed ------------------------------------------------------------------------------


@pytest.fixture
def on_meta() -> Callable[[str], torch.nn.Module]:
    """A tiny model of a family, without values."""

    def build(family: str) -> torch.nn.Module:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _build(family, make_config(family))

    return build


def by_transformers(model: torch.nn.Module) -> set[str]:
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    return {name for name, _ in model.named_parameters() if name in decayed}


PART = [family for family in FAMILIES if is_in_part(family, FAMILIES)]


@pytest.mark.parametrize(
    "families",
    [pytest.param(PART, id="a twentieth"), pytest.param(FAMILIES, id="all", marks=pytest.mark.slow)],
)
def test_the_same_weights_of_every_family_are_decayed_as_in_transformers(
    on_meta: Callable[[str], torch.nn.Module], families: Sequence[str]
) -> None:
    others: dict[str, set[str]] = {}
    num_compared = 0
    for family in families:
        try:
            model = on_meta(family)
        except (ImportError, AttributeError):  # a tower needs timm; no causal LM by itself (musicgen)
            continue
        num_compared += 1
        if differing := decayed_names(model) ^ by_transformers(model):
            others[family] = differing
    assert not others and num_compared > 0.9 * len(families)


@pytest.mark.parametrize(
    ("family", "decayed", "spared"),
    [
        (
            "gpt_oss",
            ["sinks", "down_proj"],
            ["down_proj_bias", "gate_up_proj_bias", "input_layernorm.weight"],
        ),
        ("mamba2", ["A_log", "D", "in_proj.weight"], ["dt_bias", "conv1d.bias", "mixer.norm.weight"]),
        ("mamba", ["A_log", "D"], ["dt_proj.bias"]),
        ("rwkv", ["time_decay", "time_mix_key"], ["ln1.weight", "ln2.bias"]),
        ("gpt2", ["wte.weight", "c_attn.weight"], ["ln_1.weight", "c_attn.bias"]),
    ],
)
def test_names_and_modules_spare_weights_not_their_dimensions(
    on_meta: Callable[[str], torch.nn.Module], family: str, decayed: list[str], spared: list[str]
) -> None:
    model = on_meta(family)
    found, every = decayed_names(model), [name for name, _ in model.named_parameters()]
    for ending, is_decayed in [*((one, True) for one in decayed), *((one, False) for one in spared)]:
        named = [name for name in every if name.endswith(ending)]
        assert named and all((name in found) is is_decayed for name in named), ending


def test_an_adapter_is_decayed_as_in_transformers(on_meta: Callable[[str], torch.nn.Module]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = on_meta("llama")
    settings = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    with torch.device("meta"):
        inject_adapter_in_model(settings, model)
    found = {name for name in decayed_names(model) if "lora" in name}
    assert found == {name for name in by_transformers(model) if "lora" in name}
    kinds = {name.partition(".lora_")[2].partition(".")[0] for name in found}
    assert kinds == {"A", "B", "magnitude_vector"} and not any("bias" in name for name in found)


def test_a_matrix_of_biases_is_not_moved_by_decay_and_a_vector_of_rates_is() -> None:
    class Rates(Small):
        def __init__(self, dtype: torch.dtype):
            super().__init__(dtype)
            self.experts_bias = torch.nn.Parameter(torch.full((4, 8), 0.5, dtype=dtype))
            self.A_log = torch.nn.Parameter(torch.full((8,), 0.5, dtype=dtype))

    model = Rates(torch.float32)
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.5)  # type: ignore[arg-type]
    for parameter in optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model.experts_bias, torch.full((4, 8), 0.5))
    assert torch.allclose(model.A_log, torch.full((8,), 0.5 * 0.95))
