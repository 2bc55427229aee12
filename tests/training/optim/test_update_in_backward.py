"""Gradients that are freed as they are used: the same weights to the bit, the same norm, and honest
errors.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_cache.errors import TrainingError
from dpo_cache.lm.layerwise import policy
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.policy import completion_logps
from dpo_cache.lm.self_check import choose_attention
from dpo_cache.training.layer_major import LayerMajorModel
from dpo_cache.training.optim.optimizers import make_optimizer
from dpo_cache.training.optim.update_in_backward import OptimizerInBackward
from dpo_cache.training.step_zero import StepZero
from tests.conftest import make_completions, make_llama
from tests.training.test_loop import comparable, train, weights

OPTIMIZERS = [
    "adamw",
    "adamw-bf16",
    "adafactor",
    *(["adamw-8bit"] if importlib.util.find_spec("bitsandbytes") else []),
]
COMPLETIONS = make_completions()


def step_by_hand(
    optimizer_name: str, mode: str, *, in_backward: bool, tied: bool = True
) -> tuple[torch.nn.Module, list[float], list[int]]:
    """Three steps of two backward passes each; the weights, the norms, and the gradients that are there after
    each pass.
    """
    model = make_llama(tie_word_embeddings=tied)
    attention = choose_attention(model, max_length=64)
    Recomputation(model).mode = mode
    optimizer = make_optimizer(model, optimizer_name, lr=1e-3, weight_decay=0.1)
    freeing = OptimizerInBackward(optimizer) if in_backward else None
    norms, held = [], []
    for _ in range(3):
        completion_logps(model, COMPLETIONS[:9], attention).sums().sum().backward()
        held.append(sum(parameter.grad is not None for parameter in model.parameters()))
        loss = completion_logps(model, COMPLETIONS[9:], attention).sums().sum()
        if freeing:
            with freeing.last_backward():
                loss.backward()
            assert freeing.has_begun
            norms.append(float(freeing.end_step()))
            assert not freeing.has_begun
        else:
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))))
            optimizer.step()
            optimizer.zero_grad()
        held.append(sum(parameter.grad is not None for parameter in model.parameters()))
    return model, norms, held


@pytest.mark.rotating(3)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_weights_and_norms_are_those_of_the_plain_step_bit_for_bit(name: str, mode: str) -> None:
    plain, plain_norms, _ = step_by_hand(name, mode, in_backward=False)
    model, norms, held = step_by_hand(name, mode, in_backward=True)
    assert norms == plain_norms
    for (entry, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), entry
    count = len(list(model.parameters()))
    assert held == [count, 0] * 3  # all of them before the last pass of a step, none after it


def test_few_gradients_exist_at_once_in_a_step_of_one_pass() -> None:
    model = make_llama(num_hidden_layers=6)
    attention, optimizer = (
        choose_attention(model, max_length=64),
        make_optimizer(model, lr=1e-3, weight_decay=0.0),
    )
    freeing, most = OptimizerInBackward(optimizer), 0
    use = optimizer.update

    def note(*parameters: torch.nn.Parameter, **named: object) -> None:
        nonlocal most
        most = max(most, sum(other.grad is not None for other in model.parameters()))
        use(*parameters, **named)

    optimizer.update = note  # type: ignore[method-assign]
    with freeing.last_backward():
        completion_logps(model, COMPLETIONS, attention).sums().sum().backward()
    assert most <= 3 < len(optimizer.parameters)


def test_a_weight_that_only_an_earlier_pass_used_is_updated_too() -> None:
    layers = torch.nn.ModuleDict({"one": torch.nn.Linear(3, 3), "other": torch.nn.Linear(3, 3)})
    layers.device = torch.device("cpu")  # type: ignore[assignment]
    optimizer = make_optimizer(layers, lr=0.1, weight_decay=0.0)  # type: ignore[arg-type]
    freeing, before = (
        OptimizerInBackward(optimizer),
        {name: value.clone() for name, value in layers.state_dict().items()},
    )
    layers["other"](torch.ones(3)).sum().backward()
    assert torch.equal(layers["other"].weight, before["other.weight"])
    with freeing.last_backward():
        layers["one"](torch.ones(3)).sum().backward()
    assert float(freeing.end_step()) == pytest.approx((2 * 12) ** 0.5)
    assert all(not torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    assert all(parameter.grad is None for parameter in layers.parameters())


@pytest.mark.rotating(3)
@pytest.mark.parametrize(
    "options",
    [{}, {"budget_tokens": "100"}, {"budget_tokens": "20"}, {"loss": "aot", "budget_tokens": "100"}, {"optimizer": "adafactor", "weight_decay": 0.1},
     {"optimizer": "adamw-8bit", "gradient_checkpointing": "full"}],
    ids=["one forest", "several", "single answers", "twice", "adafactor", "8 bits, recomputed"],
)  # fmt: skip
def test_a_run_gives_the_same_bits_with_and_without(cache: str, tmp_path: Path, options: dict) -> None:
    if "8bit" in options.get("optimizer", ""):
        pytest.importorskip("bitsandbytes")
    shared = {"max_grad_norm": 0.0, "batch_size": 5, **options}
    plain = train(cache, tmp_path / "plain", place="gradients=device", **shared)
    in_backward = train(cache, tmp_path / "freed", place="gradients=none", **shared)
    assert comparable(tmp_path / "freed") == comparable(tmp_path / "plain") and in_backward.num_steps == 3
    expected = weights(plain.model)
    assert all(torch.equal(value, expected[name]) for name, value in weights(in_backward.model).items())


def test_a_loss_that_is_not_finite_changes_no_weight(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, models = policy.logps_of_run, []

    def spoil(model, *rest, **extra):
        if not models:
            models.append((model, {name: value.clone() for name, value in model.state_dict().items()}))
        found = run(model, *rest, **extra)
        found.tokens_T.data[0] = torch.nan
        return found

    monkeypatch.setattr(policy, "logps_of_run", spoil)
    monkeypatch.setattr(LayerMajorModel, "problem", lambda *_, **__: "")
    monkeypatch.setattr(StepZero, "check", lambda *_: None)
    with pytest.raises(
        TrainingError,
        match=r"step 1: loss nan, .*; row \d.* of the data made it\. The weights were not updated\.",
    ):
        train(cache, tmp_path / "run", free_gradients=True, max_grad_norm=0.0, budget_tokens="100")
    model, before = models[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_rows(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = OptimizerInBackward.take

    def spoil(self, gradients):
        next(iter(gradients.values()))[0] = torch.inf
        take(self, gradients)

    monkeypatch.setattr(OptimizerInBackward, "take", spoil)
    message = r"step 1: loss 0.69\d+, gradient norm inf; rows of the data in this step: \d.* The weights were updated with it \(`place` gradients=none\): "
    with pytest.raises(TrainingError, match=message):
        train(cache, tmp_path / "run", free_gradients=True, max_grad_norm=0.0)


def test_memory_that_runs_out_amid_the_update_ends_the_run_and_before_it_does_not(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, left = OptimizerInBackward.take, [2]

    def run_out(self, gradients):
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("no memory")
        take(self, gradients)

    monkeypatch.setattr(OptimizerInBackward, "take", run_out)
    with pytest.raises(
        TrainingError,
        match="no memory while weights were being updated .*cannot be repeated.\n"
        "Continue from the last checkpoint",
    ):
        train(cache, tmp_path / "run", free_gradients=True, max_grad_norm=0.0)
    left[0] = 1
    remarks: list[str] = []
    train(cache, tmp_path / "again", free_gradients=True, max_grad_norm=0.0, max_steps=1, log=remarks.append)
    assert any("the step is repeated" in remark for remark in remarks)


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("name", "rounding"),
    list(zip(OPTIMIZERS, ["stochastic", "compensated", "stochastic", "compensated"], strict=False)),
)
def test_a_bfloat16_run_that_was_stopped_ends_as_one_that_was_not(
    cache: str, tmp_path: Path, name: str, rounding: str
) -> None:
    options = {
        "precision": "bf16",
        "optimizer": name,
        "rounding": rounding,
        "free_gradients": True,
        "max_grad_norm": 0.0,
        "max_steps": 3,
    }
    whole = train(cache, tmp_path / "whole", **options)
    train(cache, tmp_path / "parts", should_stop=lambda: True, **options)
    train(cache, tmp_path / "parts", resume=True, should_stop=lambda: True, **options)
    resumed = train(cache, tmp_path / "parts", resume=True, **options)
    assert comparable(tmp_path / "parts") == comparable(tmp_path / "whole")
    expected = AutoModelForCausalLM.from_pretrained(whole.model, dtype="auto").state_dict()
    found = AutoModelForCausalLM.from_pretrained(resumed.model, dtype="auto").state_dict()
    assert next(iter(found.values())).dtype == torch.bfloat16
    assert all(torch.equal(value, expected[entry]) for entry, value in found.items())
