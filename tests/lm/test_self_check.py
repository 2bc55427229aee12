"""The choice of a way to run a model: exact by its own forward, or refused with a true reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from accelerate import dispatch_model

from dpo_cache.errors import ModelError
from dpo_cache.lm.check_logps import FOREST, STREAM
from dpo_cache.lm.forest.flex_call import FlexCall
from dpo_cache.lm.forest.kernels import KERNELS
from dpo_cache.lm.forest.varlen import VarlenPlan
from dpo_cache.lm.policy import PolicyModel, completion_logps
from dpo_cache.lm.runner import run_loaded
from dpo_cache.lm.self_check import AttentionChoice, choose_attention
from dpo_cache.types import Completion
from tests.conftest import make_completions, make_llama, naive_token_logps
from tests.families.tiny import make_tiny
from tests.lm.families import TINY, WITH_HEADS, make_model
from tests.lm.test_families import scores


def row(length: int, seed: int = 0, answer: int = 9) -> Completion:
    ids = np.random.default_rng(seed).integers(0, 264, length).astype(np.uint32)
    return Completion(ids[:-answer], ids[-answer:])


def assert_exact(
    model: torch.nn.Module, completions: list[Completion], attention: AttentionChoice, budget: int = 4096
) -> None:
    """Scores and the policy's log-probs are those of the model's own forward."""
    found = scores(model, completions, attention, budget)
    with torch.no_grad():
        trained = completion_logps(model, completions, attention)
    if attention.original is not None:
        model.set_attn_implementation(attention.original)  # type: ignore[operator]
    expected = [naive_token_logps(model, completion).numpy() for completion in completions]
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() < 1e-4
    assert np.abs(trained.tokens_T.numpy() - np.concatenate(expected)).max() < 1e-4


# -- a forward that does more than decoder and head ---------------------------------------------------------


class ScaledEmbeddings(hf.LlamaForCausalLM):
    """As custom code may be: the top-level forward scales the embeddings."""

    def forward(self, input_ids=None, inputs_embeds=None, **others):  # type: ignore[no-untyped-def]
        if inputs_embeds is None:
            inputs_embeds = 5.0 * self.model.embed_tokens(input_ids)
        return super().forward(inputs_embeds=inputs_embeds, **others)


class BiasedLogits(hf.LlamaForCausalLM):
    """The top-level forward adds to the logits what it computes from the input ids."""

    def forward(self, input_ids=None, **others):  # type: ignore[no-untyped-def]
        output = super().forward(input_ids=input_ids, **others)
        if input_ids is not None:
            output.logits = output.logits + 3 * torch.arange(264) / 264 * (input_ids.sum() % 7)
        return output


def make_custom(kind: type[hf.LlamaForCausalLM]) -> hf.LlamaForCausalLM:
    model = kind(make_llama().config).eval()
    model.load_state_dict(make_llama().state_dict())
    return model


def test_a_forward_that_is_more_than_decoder_and_head_is_run_as_a_whole() -> None:
    model = make_custom(ScaledEmbeddings)
    attention = choose_attention(model, max_length=64)
    assert (attention.name, attention.max_rows, attention.is_whole) == ("rows", 1, True)
    assert "its forward is more than a decoder and a head: run as these two, it differs" in attention.reason
    assert_exact(model, make_completions(), attention)


def test_a_whole_forward_is_trained_with_the_gradient_of_the_model() -> None:
    model, completions = make_custom(ScaledEmbeddings), make_completions(num_prompts=2)
    policy = PolicyModel(model, choose_attention(model, max_length=64), with_squares=True)
    (logps,) = policy([completions])
    logps.sums().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = []
    for completion in completions:
        ids = torch.from_numpy(completion.sequence_ids.astype(np.int64))[None]
        all_logps = model(input_ids=ids).logits[0].log_softmax(-1)
        picked = all_logps[:-1].gather(1, ids[0, 1:, None])[:, 0]
        expected.append(picked[len(completion.prompt_ids) - 1 :])
    torch.cat(expected).sum().backward()
    assert torch.allclose(logps.tokens_T, torch.cat(expected), atol=1e-4)
    assert logps.squares_T is not None and (logps.squares_T <= 0).all()
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-4), name


def test_a_forward_in_which_all_tokens_change_the_logits_is_not_causal() -> None:
    with pytest.raises(ModelError, match="BiasedLogits is not causal"):
        choose_attention(make_custom(BiasedLogits), max_length=64)


def test_a_forward_that_was_set_on_the_model_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    plain = model.forward

    def scaled(input_ids=None, **others):  # type: ignore[no-untyped-def]
        return plain(inputs_embeds=5.0 * model.model.embed_tokens(input_ids), **others)

    monkeypatch.setattr(model, "forward", scaled)
    attention = choose_attention(model, max_length=64)
    assert attention.is_whole
    assert_exact(model, make_completions(), attention)


def test_a_model_that_fails_on_a_plain_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()

    def fails(**_: object) -> None:
        raise IndexError("no such token")

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(ModelError, match="fails on a row of plain tokens .IndexError: no such token"):
        choose_attention(model, max_length=64)


def test_a_forward_that_draws_random_numbers_is_refused_for_that() -> None:
    model = make_llama()
    model.model.layers[0].mlp.register_forward_hook(lambda *args: args[2] + torch.randn(32))
    with pytest.raises(ModelError, match="gives other log-probs when the same row is run again"):
        choose_attention(model, max_length=64)


# -- device_map ---------------------------------------------------------------------------------------------


def test_a_model_with_the_hooks_of_accelerate_is_exact_on_one_device() -> None:
    model = make_llama()
    dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    assert "forward" in model.__dict__  # which a copy of the model would share
    attention = choose_attention(model, max_length=64)
    assert attention.name == "forest" and attention.max_tokens is None
    assert_exact(model, make_completions(), attention, budget=13)


@pytest.mark.parametrize("opened", [run_loaded, choose_attention])
def test_weights_that_are_offloaded_are_refused(opened: object, tmp_path: Path) -> None:
    model = make_llama()
    dispatch_model(
        model,
        {"model": "cpu", "lm_head": "disk"},
        main_device="cpu",
        offload_dir=str(tmp_path),
        force_hooks=True,
    )
    with pytest.raises(
        ModelError, match="has weights that are not in memory.*\nLoad it without `device_map`"
    ):
        if opened is run_loaded:
            run_loaded(model, name="mine", max_length=64).__enter__()
        else:
            choose_attention(model, max_length=64)


# -- places in the row --------------------------------------------------------------------------------------


def make_llama4(floor_scale: int, **changes: object) -> hf.Llama4ForCausalLM:
    """With a layer whose temperature grows with the place in the row, whatever the position ids."""
    config = hf.Llama4TextConfig(
        **{**WITH_HEADS, "max_position_embeddings": 16384}, intermediate_size_mlp=48, num_local_experts=2, attn_temperature_tuning=True,
        layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0], floor_scale=floor_scale, attn_scale=2.0, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.Llama4ForCausalLM(config).eval()


def test_llama4_is_run_in_chunks_below_the_place_where_its_temperature_changes() -> None:
    completions = make_completions()
    for longest, budget in ((60, 4096), (60, 100)):
        model = make_llama4(64)
        attention = choose_attention(model, max_length=longest, chunk_tokens=budget)
        assert (attention.name, attention.max_tokens) == ("forest", 63)
        assert "its config names `floor_scale` 64" in attention.limited_by
        assert_exact(model, completions, attention, budget)


def test_llama4_with_rows_past_that_place_is_run_as_rows() -> None:
    model = make_llama4(24)
    attention = choose_attention(model, max_length=64)
    assert (attention.name, attention.max_rows) == ("rows", None)
    assert_exact(model, [*make_completions(), row(64)], attention)


def test_llama4_at_its_default_config_needs_no_long_rows_for_short_data() -> None:
    model, sizes = make_llama4(8192), []
    model.model.register_forward_pre_hook(
        lambda _, args, others: sizes.append(others["input_ids"].numel()), with_kwargs=True
    )
    attention = choose_attention(model, max_length=64, chunk_tokens=16384, run_tokens=20_000)
    assert (attention.name, attention.max_tokens) == ("forest", 8191)
    assert max(sizes) < 3000 and sum(sizes) < 2048 + 1000 + 1500
    assert attention.remark(model) == (
        "Llama4ForCausalLM is run with smaller chunks: its config names `attention_chunk_size` 8,192, and more "
        "than 8,191 tokens at once are not exact, or not checked."
    )


def test_rows_that_are_too_long_to_check_are_run_one_at_a_time() -> None:
    model = make_llama4(300)
    attention = choose_attention(model, max_length=1000, run_tokens=2_000)
    assert attention.name == "rows" and attention.max_rows is None  # a row of 324 tokens is checked
    model = make_llama4(3000)
    attention = choose_attention(model, max_length=4000, run_tokens=2_000)
    assert (attention.name, attention.max_rows) == ("rows", 1)
    assert attention.reason.startswith(
        "rows of the data are longer than `floor_scale` 3,000, and a check of such rows"
    )
    with pytest.raises(ModelError, match="cannot use forest attention: rows of the data are longer than"):
        choose_attention(make_llama4(3000), "forest", max_length=4000, run_tokens=2_000)


class PlaceInRow(hf.LlamaModel):
    """A decoder that counts places in the row it is given, as its own config does not say."""

    def forward(self, input_ids=None, inputs_embeds=None, **others):  # type: ignore[no-untyped-def]
        embeddings = self.embed_tokens(input_ids)
        late = (torch.arange(input_ids.shape[1]) >= 300)[None, :, None]
        return super().forward(inputs_embeds=embeddings * torch.where(late, 3.0, 1.0), **others)


def make_counting() -> hf.LlamaForCausalLM:
    model = make_llama(max_position_embeddings=2048)
    model.model.__class__ = PlaceInRow
    return model


def test_a_fault_past_a_place_that_no_config_names_is_found_at_the_end_of_a_chunk() -> None:
    model = make_counting()
    attention = choose_attention(model, max_length=64)
    assert attention.name == "rows"
    assert_exact(model, [*make_completions(), row(400)], attention)


def test_code_outside_transformers_is_run_as_far_as_it_was_checked() -> None:
    model = make_counting()
    attention = choose_attention(model, max_length=64, chunk_tokens=200)
    assert (attention.name, attention.max_tokens) == ("forest", 200)
    assert_exact(model, make_completions(), attention)
    attention = choose_attention(make_counting(), max_length=500, chunk_tokens=200)
    assert attention.name == "rows"


@pytest.mark.parametrize(("way", "name"), [((STREAM,), "forest"), ((FOREST,), "rows")])
def test_long_rows_are_checked_in_the_way_that_the_run_takes(way: tuple[str, ...], name: str) -> None:
    """Streamed in chunks of 100, no place passes 300; in one forest, places of the longest row do."""
    model = make_counting()
    model.model.__class__ = hf.LlamaModel
    plain = model.model.forward

    def counting(**others):  # type: ignore[no-untyped-def]
        output = plain(**others)
        if type(others.get("forest_plan")).__name__ == "TreePlan" and others["input_ids"].shape[1] > 300:
            output.last_hidden_state[:, 300:] += 1
        return output

    model.model.forward = counting
    assert choose_attention(model, max_length=600, chunk_tokens=1000, ways=way).name == name


# -- sparse attention, and rows of other lengths ------------------------------------------------------------


@pytest.mark.rotating(3)
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "deepseek_v4"])
def test_sparse_attention_past_its_top_k_is_run_one_row_at_a_time(family: str) -> None:
    model, completions = make_tiny(family), [*make_completions(num_prompts=2), row(120)]
    attention = choose_attention(model, max_length=128)
    assert (attention.name, attention.max_rows) == ("rows", 1)
    assert "`index_topk` 8" in attention.reason
    assert_exact(model, completions, attention)


@pytest.mark.rotating(2)
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4"])
def test_sparse_attention_below_its_top_k_is_run_as_padded_rows(family: str) -> None:
    model = make_tiny(family, index_topk=64)
    attention = choose_attention(model, max_length=60)
    assert (attention.name, attention.max_rows) == ("rows", None)
    assert_exact(model, [completion for completion in make_completions() if len(completion) <= 60], attention)


@pytest.mark.parametrize("longest", [30, 60])
def test_longrope_counts_the_longest_row(longest: int) -> None:
    scaling = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    }  # fmt: skip
    config = hf.Phi3Config(**TINY, original_max_position_embeddings=32, rope_parameters=scaling)
    torch.manual_seed(0)
    model = hf.Phi3ForCausalLM(config).eval()
    attention = choose_attention(model, max_length=longest)
    assert (attention.name, attention.max_rows) == (("forest", None) if longest < 32 else ("rows", 1))
    if attention.name == "rows":
        assert "its rotary embedding depends on the length of the row" in attention.reason
    assert_exact(model, [row(length) for length in (12, 30, longest)], attention)


def test_a_window_that_only_long_rows_pass_is_checked() -> None:
    """A model that drops its window of 200 keys under forest attention is exact up to there."""

    def make() -> hf.MistralForCausalLM:
        torch.manual_seed(0)
        config = hf.MistralConfig(**{**TINY, "max_position_embeddings": 2048}, sliding_window=200)
        model = hf.MistralForCausalLM(config).eval()
        for layer in model.model.layers:
            plain = layer.self_attn.forward

            def without_window(*args, forward=plain, **others):  # type: ignore[no-untyped-def]
                config.sliding_window = None if "forest_plan" in others else 200
                output = forward(*args, **others)
                config.sliding_window = 200
                return output

            layer.self_attn.forward = without_window
        return model

    assert choose_attention(make(), max_length=190).name == "forest"
    assert choose_attention(make(), max_length=190, run_tokens=1_000).name == "forest"
    assert choose_attention(make(), max_length=300, run_tokens=1_000).name == "rows"


# -- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [None, 200])
def test_memory_that_lasts_only_for_shorter_rows_is_a_shorter_check(named: int | None) -> None:
    model, sizes = make_llama(max_position_embeddings=2048), []
    model.config.attention_chunk_size = named  # this family's code does not read it

    def check_size(_: object, args: object, others: dict) -> None:
        size = others["input_ids"].numel()
        if size > 150:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(size)

    model.model.register_forward_pre_hook(check_size, with_kwargs=True)
    attention = choose_attention(model, max_length=1000)
    assert max(sizes) <= 150
    if named:
        assert attention.max_rows == 1 and "or not fit into memory, so one row" in attention.reason
    else:
        assert attention.name == "forest"


@pytest.mark.slow
def test_llama4_is_exact_past_8191_tokens_at_its_default_config() -> None:
    """0.69 nats a token were wrong once a chunk, or a row, passed that place."""
    short, long = [row(40, seed) for seed in range(230)], [row(8300), row(30)]
    for completions, expected in ((short, ("forest", None)), (long, ("rows", 1))):
        model = make_llama4(8192)
        attention = choose_attention(model, max_length=max(map(len, completions)), chunk_tokens=16384)
        assert (attention.name, attention.max_rows) == expected
        assert_exact(model, completions, attention, budget=16384)


# -- kernels ------------------------------------------------------------------------------------------------


def test_the_first_kernel_that_is_exact_is_used_in_chunks_and_in_forests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(KERNELS, "cpu", ("varlen", "flex", "segments"))
    chosen = {family: choose_attention(make_model(family), max_length=64) for family in ("llama", "gemma2")}
    assert {name: choice.kernel for name, choice in chosen.items()} == {"llama": "varlen", "gemma2": "flex"}
    assert all(choice.remark(make_llama()) is None for choice in chosen.values())

    real = VarlenPlan.attend

    def wrong_with_gradients(plan: VarlenPlan, *given: object) -> torch.Tensor:
        return real(plan, *given) * (1 if plan.paths is not None else 1.1)

    monkeypatch.setattr(VarlenPlan, "attend", wrong_with_gradients)
    assert choose_attention(make_llama(), max_length=64).kernel == "flex"


def test_a_kernel_that_is_slower_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setitem(KERNELS, "cpu", ("flex", "segments"))
    monkeypatch.setattr(FlexCall, "compute", fails)
    choice = choose_attention(make_llama(), max_length=64)
    assert choice.kernel == "segments"
    assert choice.remark(make_llama()) == (
        "LlamaForCausalLM is run with one attention call for each segment, which is slower: by flex, it fails "
        "(no compiler)."
    )
