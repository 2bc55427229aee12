"""Answers are drawn from the model's own probabilities, in every family, whatever it is wrapped in."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from dpo_cache.lm import generation
from dpo_cache.lm.forest.attention import FOREST_ATTENTION
from dpo_cache.lm.generation import ready_to_generate, write_answers
from dpo_cache.lm.kernels.onednn_linear import ONEDNN, products_of, use_fast_linear
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.policy import PolicyModel, completion_logps
from dpo_cache.lm.self_check import AttentionChoice, choose_attention
from tests.conftest import make_completions, make_llama
from tests.lm.families import FAMILIES, make_model

END, PAD = 256, 257


def prompts(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(0, 250, length).astype(np.uint32) for length in lengths]


def write(
    model: PreTrainedModel, texts: list[np.ndarray], attention: AttentionChoice, **changes
) -> list[generation.Answer]:
    return write_answers(
        PolicyModel(model, attention),
        texts,
        model=model,
        attention=attention,
        **{"max_length": 30, "end_ids": [END], "pad_id": PAD, "seed": [3, 5], **changes},
    )


@torch.no_grad()
def naive_answers(
    model: PreTrainedModel, texts: list[np.ndarray], max_length: int, first: int
) -> list[list[int]]:
    """The definition: softmax of the last logits of each sequence by itself, without a cache. All rows are
    drawn for until the last one ends; what is drawn for an ended one is dropped.
    """
    number = int(np.random.SeedSequence([3, 5, first]).generate_state(1, np.uint64)[0]) >> 1
    rows, has_ended = [[int(token) for token in text] for text in texts], [False] * len(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        for _ in range(max_length):
            if all(has_ended):
                break
            probs = torch.stack(
                [
                    model(torch.tensor([row]), use_cache=False).logits[0, -1].float().softmax(-1)
                    for row in rows
                ]
            )
            for place, token in enumerate(torch.multinomial(probs, 1)[:, 0].tolist()):
                if not has_ended[place]:
                    rows[place].append(token)
                    has_ended[place] = token == END or len(rows[place]) == max_length
    return [row[len(text) :] for row, text in zip(rows, texts, strict=True)]


@pytest.mark.rotating(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_draws_from_its_own_probabilities(family: str) -> None:
    model = make_model(family)
    attention, texts = choose_attention(model, max_length=64), prompts(9, 3, 14)
    found = write(model, texts, attention, max_length=24)
    with ready_to_generate(model, attention):
        batches = [texts] if attention.max_rows is None else [[text] for text in texts]
        expected = [
            answer for first, batch in enumerate(batches) for answer in naive_answers(model, batch, 24, first)
        ]
    assert [answer.token_ids.tolist() for answer in found] == expected
    assert [answer.is_finished for answer in found] == [END in answer for answer in expected]


def test_answers_end_with_an_end_token_or_at_the_length() -> None:
    model = make_llama()
    attention, texts = choose_attention(model, max_length=64), prompts(5, 20, 29, 8)
    every_token_ends = write(model, texts, attention, end_ids=list(range(264)))
    assert [(answer.token_ids.size, answer.is_finished) for answer in every_token_ends] == [(1, True)] * 4
    none_ends = write(model, texts, attention, end_ids=[])
    assert [(answer.token_ids.size, answer.is_finished) for answer in none_ends] == [
        (25, False),
        (10, False),
        (1, False),
        (22, False),
    ]
    some_end = write(model, texts, attention, end_ids=list(range(0, 264, 8)))
    assert {answer.is_finished for answer in some_end} == {True, False}
    for answer in some_end:
        assert answer.is_finished == (answer.token_ids[-1] % 8 == 0) and (answer.token_ids[:-1] % 8).all()


def test_the_models_own_generation_config_has_no_effect_and_comes_back() -> None:
    model, texts = make_llama(), prompts(6, 4)
    attention = choose_attention(model, max_length=64)
    expected = write(model, texts, attention)
    own = GenerationConfig(
        repetition_penalty=5.0,
        top_k=1,
        suppress_tokens=list(range(100)),
        min_new_tokens=9,
        max_length=7,
        eos_token_id=3,
    )
    model.generation_config = own
    for one, other in zip(write(model, texts, attention), expected, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
    assert model.generation_config is own


def test_the_forest_is_back_afterwards_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, completions = make_llama(), make_completions()
    attention = choose_attention(model, max_length=64)
    before = completion_logps(model, completions, attention).tokens_T
    write(model, prompts(4), attention)
    assert model.config._attn_implementation == FOREST_ATTENTION
    assert torch.equal(completion_logps(model, completions, attention).tokens_T, before)
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(model, prompts(4), attention)
    assert model.config._attn_implementation == FOREST_ATTENTION


def test_only_the_seed_decides_and_no_other_random_state_changes() -> None:
    model, texts = make_llama(), prompts(6, 4, 9)
    attention = choose_attention(model, max_length=64)

    def written(*seed: int) -> list[list[int]]:
        return [answer.token_ids.tolist() for answer in write(model, texts, attention, seed=seed)]

    torch.manual_seed(11)
    state, first = torch.get_rng_state(), written(0, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert written(0, 8) == first
    assert written(0, 9) != first and written(1, 8) != first


@pytest.mark.parametrize("autocast", [False, True])
def test_answers_are_the_same_under_the_wrappers_of_training(autocast: bool) -> None:
    plain, texts = make_llama(), prompts(6, 4)
    wrapped = make_llama()
    attention = choose_attention(wrapped, max_length=64)
    if not autocast:  # autocast casts float32 layers, so oneDNN's would not run
        assert use_fast_linear(wrapped, decided="onednn") == "onednn"
        assert products_of(wrapped.lm_head) is ONEDNN
    Recomputation(wrapped).mode = "full"
    own = choose_attention(plain, "rows", max_length=64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = write(wrapped, texts, attention), write(plain, texts, own)
    assert [answer.token_ids.tolist() for answer in found] == [
        answer.token_ids.tolist() for answer in expected
    ]


def test_fewer_are_written_at_once_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = make_llama(), []
    attention, generate = choose_attention(model, max_length=64), model.generate

    def run_out(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", run_out)
    assert len(write(model, prompts(*[9] * 7), attention, end_ids=[])) == 7
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(generation, "MOST_AT_ONCE", 2)
    sizes.clear()
    assert len(write(model, prompts(*[9] * 5), attention, end_ids=[])) == 5
    assert sizes == [2, 2, 1]


def test_one_answer_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    attention = choose_attention(model, max_length=64)

    def run_out(**_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "generate", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        write(model, prompts(5, 5), attention)
    assert model.config._attn_implementation == FOREST_ATTENTION


def test_answers_end_where_the_models_positions_do() -> None:
    model, calls = make_model("gpt2"), []
    positions = model.config.max_position_embeddings
    attention, generate = choose_attention(model, max_length=64), model.generate
    model.generate = lambda **inputs: calls.append(inputs) or generate(**inputs)
    texts = prompts(positions - 3, 5, positions - 1)
    found = write(model, texts, attention, max_length=positions, end_ids=[])
    assert [len(answer.token_ids) for answer in found] == [1, 1, 1] and len(calls) == 1
