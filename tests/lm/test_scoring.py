import numpy as np
import pytest
import torch
import transformers as hf

from dpo_cache.errors import ModelError
from dpo_cache.lm import budget as budget_module
from dpo_cache.lm.budget import Budget
from dpo_cache.lm.check_logps import TOLERANCES
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.model.parts import decoder_of
from dpo_cache.lm.policy import completion_logps
from dpo_cache.lm.self_check import AttentionChoice, choose_attention, score_completions
from dpo_cache.types import Completion
from tests.conftest import make_completions, make_llama, naive_token_logps
from tests.lm.families import TINY, make_model
from tests.lm.test_families import fixed, scores


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_forest_and_stays_near_float32(dtype: torch.dtype) -> None:
    completions = make_completions(num_prompts=3)
    exact = scores(make_llama(), completions, AttentionChoice("rows", ""), 4096)
    model = make_llama().to(dtype)
    attention = choose_attention(model, max_length=64)
    assert attention.name == "forest" and attention.gap <= TOLERANCES[dtype][0]
    gaps = np.concatenate(
        [
            np.abs(one - other)
            for one, other in zip(scores(model, completions, attention, 64), exact, strict=True)
        ]
    )
    # twice the gaps in docs/measurements.md
    assert 0 < gaps.max() < {torch.bfloat16: 0.6, torch.float16: 0.07}[dtype]
    assert all(score.dtype == np.float32 for score in scores(model, completions[:1], attention, 64))


def test_a_requested_forest_that_is_inexact_is_refused() -> None:
    with pytest.raises(ModelError, match="BloomForCausalLM cannot use forest attention"):
        choose_attention(make_model("bloom"), "forest", max_length=64)


def test_rotary_embeddings_that_depend_on_the_row_are_run_one_row_at_a_time() -> None:
    scaling = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    }  # fmt: skip
    config = hf.Phi3Config(**TINY, original_max_position_embeddings=32, rope_parameters=scaling)
    torch.manual_seed(0)
    model = hf.Phi3ForCausalLM(config).eval()
    attention = choose_attention(model, max_length=100)
    assert (attention.name, attention.max_rows) == ("rows", 1)
    lengths = (10, 31, 40, 90)
    completions = [
        Completion(np.arange(length, dtype=np.uint32), np.arange(5, 9, dtype=np.uint32)) for length in lengths
    ]
    for completion, found in zip(completions, scores(model, completions, attention, 4096), strict=True):
        assert np.abs(found - naive_token_logps(model, completion).numpy()).max() < 3e-5


@pytest.mark.parametrize("max_length", [2, 3, 14, 20, 32, 33, 256])
def test_every_maximum_length_can_be_checked(max_length: int) -> None:
    assert choose_attention(make_llama(), max_length=max_length).name == "forest"


def test_a_bidirectional_model_is_refused() -> None:
    config = hf.BertConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    with pytest.raises(ModelError, match="is not causal"):
        choose_attention(hf.BertLMHeadModel(config).eval(), max_length=64)


def test_weights_that_are_not_finite_are_refused_before_anything_is_scored() -> None:
    model = make_llama()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ModelError, match="gives log-probs that are NaN or infinite"):
        choose_attention(model, max_length=64)


@pytest.mark.parametrize("name", ["forest", "rows"])
def test_memory_that_runs_out_halves_the_chunk_and_loses_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, completions, remarks = make_llama(), make_completions(), []
    attention = choose_attention(model, "auto" if name == "forest" else "rows", max_length=64)
    whole = scores(model, completions, attention, 4096)
    decoder, real = decoder_of(model), decoder_of(model).forward

    def limited(*arguments, **options):
        if options["input_ids"].numel() > 90:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*arguments, **options)

    monkeypatch.setattr(decoder, "forward", limited)
    budget = Budget(300, torch.device("cpu"), remarks.append)
    found = dict(
        entry
        for progress in score_completions(model, completions, attention, budget)
        for entry in progress.scores
    )
    assert remarks == [
        "out of memory with 300 tokens at once; continuing with 150. Nothing is lost.",
        "out of memory with 150 tokens at once; continuing with 75. Nothing is lost.",
    ]
    assert sorted(found) == list(range(len(completions)))
    assert all(np.abs(found[index].token_logps - values).max() < 1e-5 for index, values in enumerate(whole))


def test_memory_that_runs_out_in_the_middle_scores_only_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, completions, sizes = make_llama(), make_completions(num_prompts=20), []
    attention = choose_attention(model, max_length=64)
    whole = scores(model, completions, attention, 4096)
    decoder, real = decoder_of(model), decoder_of(model).forward

    def limited(*arguments, **options):
        sizes.append(options["input_ids"].numel())
        if len(sizes) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*arguments, **options)

    monkeypatch.setattr(decoder, "forward", limited)
    budget = Budget(64, torch.device("cpu"), lambda _: None)
    steps = list(score_completions(model, completions, attention, budget))
    found = dict(entry for step in steps for entry in step.scores)
    assert sum(len(step.scores) for step in steps) == len(found) == len(completions)
    assert all(np.abs(found[index].token_logps - values).max() < 1e-5 for index, values in enumerate(whole))
    assert sizes[:4] == [64] * 4 and set(sizes[4:-1]) == {32}
    assert sum(step.num_tokens for step in steps) == steps[-1].total_tokens


def test_memory_that_never_suffices_is_an_error() -> None:
    budget = Budget(100, torch.device("cpu"), lambda _: None)
    budget.halve(torch.OutOfMemoryError())
    with pytest.raises(ModelError, match="out of memory even with 50 tokens at once"):
        budget.halve(torch.OutOfMemoryError())


def test_the_message_of_a_device_without_an_error_of_its_own_is_shown() -> None:
    remarks: list[str] = []
    Budget(100, torch.device("cpu"), remarks.append).halve(
        RuntimeError("MPS backend ran out of memory\nmore")
    )
    assert remarks == [
        "MPS backend ran out of memory with 100 tokens at once; continuing with 50. Nothing is lost."
    ]


def test_memory_that_ends_in_the_self_check_is_no_reason_for_plain_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("dpo_cache.lm.check_logps.score_forest", run_out)
    with pytest.raises(ModelError, match="out of memory on a few short sequences"):
        choose_attention(make_llama(), max_length=64)


def test_a_model_that_drops_the_plan_is_run_as_rows_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    plain = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *arguments, forest_plan=None, **others: plain(*arguments, **others)
    )
    attention = choose_attention(model, max_length=64)
    assert (attention.name, attention.reason) == (
        "rows",
        "its code does not pass the plan of the forest to its attention",
    )


def test_the_search_for_a_chunk_takes_the_first_that_a_larger_one_does_not_beat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget_module, "SIZES", {"cpu": (512, 1024, 2048, 4096)})
    speeds = {512: 100.0, 1024: 130.0, 2048: 131.0, 4096: 500.0}  # tokens/s
    budget = Budget(None, torch.device("cpu"), lambda _: None)
    tried = []
    while not budget.has_stopped and len(tried) < 20:
        tried.append(budget.tokens)
        budget.note(budget.tokens, budget.tokens / speeds[budget.tokens])
    assert tried == [512, 512, 1024, 1024, 2048, 2048] and budget.tokens == 1024


def test_progress_counts_every_token_of_the_stream_once() -> None:
    model, completions = make_llama(), make_completions()
    attention = choose_attention(model, max_length=64)
    steps = list(score_completions(model, completions, attention, fixed(10)))
    assert sum(step.num_tokens for step in steps) == steps[0].total_tokens == len({
        tuple(completion.sequence_ids[: end + 1]) for completion in completions for end in range(len(completion.sequence_ids))
    })  # fmt: skip
    assert sorted(index for step in steps for index, _ in step.scores) == list(range(len(completions)))


@pytest.mark.rotating(3)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "llama4", "deepseek_v3"])
def test_training_logps_and_gradients_equal_the_plain_computation(family: str) -> None:
    completions = make_completions(num_prompts=3)
    weights = torch.linspace(-1, 1, len(completions), dtype=torch.float64)
    plain, model = make_model(family), make_model(family)
    expected = []
    for completion in completions:
        ids = torch.from_numpy(completion.sequence_ids.astype(np.int64))[None]
        logps = (
            plain(input_ids=ids, use_cache=False)
            .logits[0]
            .float()
            .log_softmax(-1)[:-1]
            .gather(1, ids[0, 1:, None])[:, 0]
        )
        expected.append(logps[len(completion.prompt_ids) - 1 :].double().sum())
    (torch.stack(expected) * weights).sum().backward()
    attention = choose_attention(model, max_length=64)
    found = completion_logps(model, completions, attention).sums()
    (found * weights).sum().backward()
    assert attention.name == "forest"
    assert torch.allclose(found, torch.stack(expected), rtol=1e-6, atol=1e-4)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert torch.allclose(
                one.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max())
            ), name


def test_checkpointed_layers_give_the_same_gradient() -> None:
    completions, grads = make_completions(num_prompts=2), []
    for mode in ("none", "selective", "full"):
        model = make_llama()
        attention = choose_attention(model, max_length=64)
        recomputation = Recomputation(model)
        assert recomputation.num_layers == 2
        recomputation.mode = mode
        completion_logps(model, completions, attention).sums().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(
        torch.equal(one, other)
        for recomputed in grads[1:]
        for one, other in zip(grads[0], recomputed, strict=True)
    )


def test_rows_have_gradients_too() -> None:
    model = make_model("falcon")
    completions = make_completions(num_prompts=2)
    logps = completion_logps(model, completions, choose_attention(model, max_length=64)).sums()
    logps.sum().backward()
    expected = torch.stack([naive_token_logps(model, completion).sum() for completion in completions])
    assert torch.allclose(logps, expected, atol=1e-3)
    assert all(
        parameter.grad is not None
        for name, parameter in model.named_parameters()
        if "word_embeddings" in name
    )
