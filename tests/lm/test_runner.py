"""The one way to score: what is loaded, refused and undone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dpo_cache.errors import ModelError
from dpo_cache.lm import runner as runner_module
from dpo_cache.lm.budget import Budget
from dpo_cache.lm.model.load import load_config
from dpo_cache.lm.runner import Runner, open_runner, run_loaded
from dpo_cache.lm.streaming import choose_streaming
from dpo_cache.types import Score
from tests.conftest import make_completions, make_llama, naive_token_logps
from tests.families.tiny import make_tiny
from tests.lm.families import make_model

CPU = torch.device("cpu")


def score(runner: Runner, completions: list) -> dict[int, Score]:
    steps = runner.score(completions, rows_of=lambda index: [index])
    return dict(entry for step in steps for entry in step.scores)


@pytest.mark.parametrize("attention", ["forest", "rows"])
def test_scores_are_the_log_probs_of_the_model_in_the_folder(model_folder: str, attention: str) -> None:
    completions, model = make_completions(), make_llama()
    with open_runner(
        model_folder, dtype=torch.float32, device=CPU, attention=attention, max_length=64, budget_tokens=40
    ) as runner:
        found = score(runner, completions)
        assert (runner.attention.name, runner.name) == (attention, model_folder)
    assert sorted(found) == list(range(len(completions)))
    for index, completion in enumerate(completions):
        expected = naive_token_logps(model, completion).numpy()
        assert np.abs(found[index].token_logps - expected).max() < 3e-5


def test_a_loaded_model_is_as_it_was_when_the_runner_closes() -> None:
    model = make_llama().train()
    model.model.norm.eval()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with run_loaded(model, name="mine", max_length=64, budget_tokens=40) as runner:
        assert not model.training and model.config._attn_implementation != "sdpa"
        first = score(runner, make_completions())
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert after.keys() == before.keys()
    for name, fields in before.items():
        assert after[name].keys() == fields.keys(), name
        assert after[name]["training"] == fields["training"], name
    assert model.config._attn_implementation == "sdpa"
    with run_loaded(model, name="mine", max_length=64, budget_tokens=40) as runner:
        again = score(runner, make_completions())
    assert all(np.array_equal(first[index].token_logps, again[index].token_logps) for index in first)


def test_a_model_is_as_it_was_after_an_error() -> None:
    model = make_llama().train()
    with pytest.raises(KeyboardInterrupt), run_loaded(model, name="mine", max_length=64):
        raise KeyboardInterrupt
    assert model.training and model.config._attn_implementation == "sdpa"


def test_padded_rows_under_auto_are_remarked_once() -> None:
    remarks: list[str] = []
    with run_loaded(make_model("bloom"), name="bloom", max_length=64, log=remarks.append) as runner:
        score(runner, make_completions())
        score(runner, make_completions())
        assert runner.attention.name == "rows"
    assert len(remarks) == 1 and remarks[0].startswith("BloomForCausalLM is run as plain padded rows, which")
    with run_loaded(
        make_model("bloom"), name="bloom", attention="rows", max_length=64, log=remarks.append
    ) as runner:
        score(runner, make_completions())
    assert len(remarks) == 1


@pytest.mark.parametrize(
    ("dtype", "cause"),
    [
        (torch.float32, "Its weights may be damaged."),
        (torch.bfloat16, "Its weights may be damaged, or bfloat16 too coarse for it. Use float32."),
        (torch.float16, "float16 overflows beyond 65,504, or its weights are damaged. Use bfloat16 or"),
    ],
)
def test_a_log_prob_that_is_not_finite_names_the_rows_that_cause_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, cause: str
) -> None:
    completions = make_completions()
    real = runner_module.score_completions

    def poisoned(model, several, attention, budget):  # type: ignore[no-untyped-def]
        """NaN for the third completion, and for each in the same chunk."""
        for step in real(model, several, attention, budget):
            if any(several[index] is completions[3] for index, _ in step.scores):
                for _, one in step.scores:
                    one.token_logps[:] = np.nan
            yield step

    monkeypatch.setattr(runner_module, "score_completions", poisoned)
    with run_loaded(make_llama(), name="mine", max_length=64, budget_tokens=64) as runner:
        halved = Runner(runner.model.to(dtype), runner.name, runner.attention, runner.budget)
        with pytest.raises(ModelError) as caught:
            list(halved.score(completions, rows_of=lambda index: [10 * index, 10 * index + 1]))
    first, second = str(caught.value).splitlines()
    assert first == "mine gives a log-prob that is NaN or infinite for rows 30, 31."
    assert second.startswith(cause) and second.endswith(" The scores of this chunk are discarded.")


def test_a_log_prob_below_all_bounds_names_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    real = runner_module.score_completions

    def poisoned(model, several, attention, budget):  # type: ignore[no-untyped-def]
        for step in real(model, several, attention, budget):
            for _, one in step.scores:
                one.token_logps[:1] = -3e38
            yield step

    monkeypatch.setattr(runner_module, "score_completions", poisoned)
    with (
        run_loaded(make_llama(), name="mine", max_length=64, budget_tokens=64) as runner,
        pytest.raises(ModelError, match="^mine gives a log-prob that is below -1,000,000 nats for row 0"),
    ):
        list(runner.score(make_completions()[:1], rows_of=lambda index: [index]))


def test_a_budget_that_is_given_is_kept_and_one_that_is_not_is_found(model_folder: str) -> None:
    for given, expected in ((48, 48), (None, Budget(None, CPU, lambda _: None).tokens)):
        with open_runner(
            model_folder, dtype=torch.float32, device=CPU, max_length=64, budget_tokens=given
        ) as runner:
            assert runner.budget.tokens == expected and runner.budget.has_stopped == (given is not None)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ModelError, match="no model can be loaded"),
        open_runner(str(tmp_path), dtype=torch.float32, device=CPU, max_length=64),
    ):
        pass


def test_the_budget_and_the_run_bound_the_chunks_that_are_checked_and_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remarks: list[str] = []
    model = make_model("llama4")
    for budget, run_tokens, expected in ((300, None, 300), (20_000, 10_000, 8191)):
        with run_loaded(
            model, name="mine", max_length=64, budget_tokens=budget, run_tokens=run_tokens, log=remarks.append
        ) as runner:
            score(runner, make_completions())
            assert runner.attention.name == "forest" and runner.budget.tokens == expected
    assert remarks == [
        "Llama4ForCausalLM is run with smaller chunks: its config names `floor_scale` 8,192, and more than 8,191 "
        "tokens at once are not exact, or not checked."
    ]


def test_rows_that_run_one_at_a_time_are_remarked_even_if_rows_were_requested() -> None:
    remarks: list[str] = []
    model = make_tiny("deepseek_v32")
    with run_loaded(model, name="mine", attention="rows", max_length=64, log=remarks.append) as runner:
        found = score(runner, make_completions())
        assert runner.attention.max_rows == 1
    assert len(remarks) == 1 and remarks[0].startswith(
        "DeepseekV32ForCausalLM is run as plain rows, which is"
    )
    for index, completion in enumerate(make_completions()):
        assert np.abs(found[index].token_logps - naive_token_logps(model, completion).numpy()).max() < 1e-4


@pytest.mark.rotating(2)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_adapter_gives_the_scores_of_a_resident_one(dtype: torch.dtype, tmp_path: Path) -> None:
    make_llama(num_hidden_layers=4).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    folder = str(tmp_path / "adapter")
    model.save_pretrained(folder)
    loading = {"dtype": dtype, "device": CPU, "revision": None}
    streaming = choose_streaming("on", folder, load_config(folder), **loading)
    completions, found = make_completions(num_prompts=2), []
    for chosen in (None, streaming):
        with open_runner(folder, max_length=64, budget_tokens=40, streaming=chosen, **loading) as runner:
            assert (runner.layer_major is None) == (chosen is None)
            found.append(score(runner, completions))
    for index, one in found[0].items():
        assert np.array_equal(one.token_logps, found[1][index].token_logps)
