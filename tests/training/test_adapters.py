"""Adapters: trained over frozen weights, saved without them, merged, resumed, and part of a reference."""

import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_cache
from dpo_cache.errors import ModelError, OptionError, TrainingError
from dpo_cache.store import open_cache
from tests.conftest import chat_rows, make_llama, make_tokenizer, naive_token_logps, write_rows
from tests.training.test_loop import comparable, metrics, train, weights

# peft's own code, called here directly, asks transformers for an older name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA = {"lora_r": 4, "lr": 1e-2}


def adapter_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder, "adapter_model.safetensors"))


def test_only_a_fresh_adapter_is_saved_and_it_starts_as_the_reference(
    cache: str, tmp_path: Path, model_folder: str
) -> None:
    remarks: list[str] = []
    report = train(cache, tmp_path / "run", eval_pairs="heldout", log=remarks.append, **LORA)
    assert report.step_zero_gap is not None and report.step_zero_gap < 1e-4
    assert any("the policy is the reference" in remark for remark in remarks)
    assert 0 < report.num_trained < report.num_parameters / 4
    assert (tmp_path / "run/model/adapter_model.safetensors").exists() and not (
        tmp_path / "run/model/model.safetensors"
    ).exists()
    assert AutoTokenizer.from_pretrained(report.model).chat_template == make_tokenizer().chat_template
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = PeftModel.from_pretrained(base, report.model)
    completion = next(iter(open_cache(cache).pairs("heldout"))).pair.chosen
    moved = naive_token_logps(adapted, completion) - naive_token_logps(make_llama(), completion)
    assert float(moved.abs().max()) > 1e-2
    with adapted.disable_adapter():
        assert torch.equal(
            naive_token_logps(adapted, completion), naive_token_logps(make_llama(), completion)
        )


def test_gradients_of_an_adapter_are_those_of_peft(cache: str, tmp_path: Path) -> None:
    report = train(
        cache,
        tmp_path / "run",
        shuffle=False,
        max_steps=1,
        batch_size=5,
        lora_r=4,
        lora_alpha=16.0,
        lora_targets="q_proj,down_proj",
        seed=3,
    )
    from peft import get_peft_model

    plain = make_llama()
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(plain, config).eval()
    pairs = list(open_cache(cache).pairs("pairs"))[:5]

    def sums(completion):  # type: ignore[no-untyped-def]
        ids = torch.from_numpy(completion.sequence_ids.astype("int64"))[None]
        logps = model(input_ids=ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        return logps[len(completion.prompt_ids) - 1 :].double().sum()

    margins = [
        sums(e.pair.chosen) - sums(e.pair.rejected) - (e.ref_chosen.logps - e.ref_rejected.logps)
        for e in pairs
    ]
    torch.stack([-(0.1 * margin).sigmoid().log() for margin in margins]).mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert report.first is not None and report.first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_merged_adapter_is_a_plain_model(cache: str, tmp_path: Path, model_folder: str) -> None:
    alone = train(cache, tmp_path / "alone", max_steps=3, **LORA)
    merged = train(cache, tmp_path / "merged", max_steps=3, merge_adapter=True, **LORA)
    assert not (tmp_path / "merged/model/adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(merged.model)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), alone.model)
    completion = next(iter(open_cache(cache).pairs("heldout"))).pair.chosen
    assert torch.allclose(
        naive_token_logps(plain, completion), naive_token_logps(adapted, completion), atol=1e-4
    )


@pytest.mark.rotating(3)
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_resumed_adapter_ends_as_one_that_never_stopped(
    cache: str, tmp_path: Path, stop_after: int
) -> None:
    options = {"eval_pairs": "heldout", "eval_every": 1, "max_steps": 4, **LORA}
    train(cache, tmp_path / "whole", **options)
    calls: list[int] = []
    train(
        cache,
        tmp_path / "cut",
        should_stop=lambda: len(calls) + 1 == stop_after or calls.append(1),
        **options,
    )
    remarks: list[str] = []
    assert train(cache, tmp_path / "cut", resume=True, log=remarks.append, **options).finished
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    one, other = adapter_weights(tmp_path / "whole/model"), adapter_weights(tmp_path / "cut/model")
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert any("the policy with its adapter switched off is the reference" in remark for remark in remarks)


def test_an_adapter_is_trained_on_and_scored_as_a_reference(cache: str, tmp_path: Path) -> None:
    first = train(cache, tmp_path / "first", max_steps=3, **LORA)
    remarks: list[str] = []
    further = train(cache, tmp_path / "further", model=first.model, max_steps=1, log=remarks.append)
    assert further.step_zero_gap is not None and further.step_zero_gap > 1e-2
    assert any("the policy with its adapter switched off is the reference" in remark for remark in remarks)
    assert any("another model than the reference" in remark for remark in remarks)
    data = write_rows(tmp_path / "more.jsonl", chat_rows(6))
    dpo_cache.precompute(first.model, data, tmp_path / "cache")
    identity = open_cache(tmp_path / "cache").read_reference(
        open_cache(tmp_path / "cache").pairs("more").reference_id
    )["identity"]
    assert identity["adapter"]["config"]["r"] == 4 and len(identity["adapter"]["weights"]) == 64
    report = dpo_cache.train(tmp_path / "cache", tmp_path / "second", max_steps=1, log=remarks.append)
    assert report.step_zero_gap is not None and report.step_zero_gap < 1e-3
    assert remarks[-1].endswith("the policy is the reference.")


def test_another_adapter_over_the_same_base_is_another_reference(cache: str, tmp_path: Path) -> None:
    folders = [
        train(cache, tmp_path / name, max_steps=2, seed=seed, **LORA).model
        for name, seed in (("a", 0), ("b", 1))
    ]
    data = write_rows(tmp_path / "pairs.jsonl", chat_rows(3))
    ids = [
        dpo_cache.precompute(folder, data, tmp_path / "cache", name=f"n{i}").reference
        for i, folder in enumerate(folders)
    ]
    assert ids[0] != ids[1]


def test_any_peft_config_serves(cache: str, tmp_path: Path) -> None:
    IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ).save_pretrained(tmp_path / "ia3")
    LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(
        tmp_path / "dora"
    )
    for kind in ("ia3", "dora"):
        report = train(
            cache,
            tmp_path / f"run-{kind}",
            max_steps=2,
            peft_config=str(tmp_path / kind / "adapter_config.json"),
            lr=1e-2,
        )
        assert report.step_zero_gap is not None and report.step_zero_gap < 1e-3
        assert report.last is not None and report.last["grad_norm"] > 0


def test_unsuitable_options_of_an_adapter_are_refused(cache: str, tmp_path: Path) -> None:
    PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM").save_pretrained(tmp_path / "prompt")
    with pytest.raises(OptionError, match="adapters of the kind PROMPT_TUNING are not supported"):
        train(cache, tmp_path / "run", peft_config=str(tmp_path / "prompt/adapter_config.json"))
    (tmp_path / "broken.json").write_text('{"peft_type": "NONE"}')
    with pytest.raises(OptionError, match="no PEFT config can be read from it"):
        train(cache, tmp_path / "run", peft_config=str(tmp_path / "broken.json"))
    with pytest.raises(
        OptionError, match=r"LlamaForCausalLM has no layer called absent_proj(?s:.*)linear layers: .*q_proj"
    ):
        train(cache, tmp_path / "run", lora_r=2, lora_targets="absent_proj")
    with pytest.raises(TrainingError, match="`merge_adapter` needs an adapter"):
        train(cache, tmp_path / "run", merge_adapter=True)
    with pytest.raises(TrainingError, match="`quantize` 4bit needs an adapter"):
        train(cache, tmp_path / "run", quantize="4bit")
    assert not (tmp_path / "run").exists()
    trained = train(cache, tmp_path / "run", max_steps=1, **LORA)
    with pytest.raises(TrainingError, match="is an adapter already, which would be trained on"):
        train(cache, tmp_path / "other", model=trained.model, **LORA)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"alora_invocation_tokens": [5, 6]}, "an adapter with alora_invocation_tokens is not supported"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "an adapter with layer_replication is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type SEQ_CLS: the policy is a causal language model"),
        ({"target_modules": "(("}, "cannot take this adapter"),
        ({"trainable_token_indices": [99_999]}, "cannot take this adapter"),
        (
            {"target_modules": ["q_proj", "v_porj", "k_prj"]},
            r"no layer called k_prj or v_porj \(`lora_targets`(?s:.*)q_proj",
        ),
        ({"modules_to_save": ["nope"]}, r"no layer called nope \(modules_to_save"),
    ],
)
def test_configs_with_unknown_layers_or_kinds_are_refused(
    cache: str, tmp_path: Path, fields: dict, text: str
) -> None:
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields}
    (tmp_path / "lora.json").write_text(json.dumps(config))
    with pytest.raises(OptionError, match=text):
        train(cache, tmp_path / "run", peft_config=str(tmp_path / "lora.json"))
    assert not (tmp_path / "run").exists()


@pytest.mark.rotating(3)
@pytest.mark.parametrize("targets", ["layers.1.self_attn.q_proj,v_proj", "q_proj,mlp.up_proj", "all-linear"])
def test_names_of_layers_may_be_whole_or_their_ends(cache: str, tmp_path: Path, targets: str) -> None:
    assert train(cache, tmp_path / "run", max_steps=1, lora_r=2, lora_targets=targets).num_trained > 0


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_starts_that_move_the_base_are_refused(cache: str, tmp_path: Path, start: str) -> None:
    (tmp_path / "lora.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "init_lora_weights": start})
    )
    with pytest.raises(
        OptionError, match=f"init_lora_weights '{start}': such an adapter changes the weights under it"
    ):
        train(cache, tmp_path / "run", peft_config=str(tmp_path / "lora.json"))


# peft's warning to everyone who trains tied embeddings
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_place_of_a_shared_weight_is_not_merged(tmp_path: Path, target: str) -> None:
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    dpo_cache.precompute(
        tmp_path / "model", write_rows(tmp_path / "pairs.jsonl", chat_rows(6)), tmp_path / "cache"
    )
    options = {"lora_r": 2, "lora_targets": f"q_proj,{target}", "max_steps": 1, "lr": 1e-2}
    with pytest.raises(OptionError, match="`merge_adapter`: embeddings and LM head share one weight"):
        train(str(tmp_path / "cache"), tmp_path / "run", merge_adapter=True, **options)
    assert train(str(tmp_path / "cache"), tmp_path / "run", **options).finished


def test_an_adapter_that_trains_biases_is_resumed(tmp_path: Path) -> None:
    """Switched off, peft leaves the biases as they are trained: then it is not the base, and step zero does
    not say so.
    """
    make_llama(attention_bias=True).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    dpo_cache.precompute(
        tmp_path / "model", write_rows(tmp_path / "pairs.jsonl", chat_rows(12)), tmp_path / "cache"
    )
    (tmp_path / "lora.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only"})
    )
    options = {"peft_config": str(tmp_path / "lora.json"), "max_steps": 3, "lr": 1e-2}
    train(str(tmp_path / "cache"), tmp_path / "whole", **options)
    train(str(tmp_path / "cache"), tmp_path / "cut", should_stop=lambda: True, **options)
    assert train(str(tmp_path / "cache"), tmp_path / "cut", resume=True, **options).finished
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


def test_the_report_of_a_merged_adapter_counts_the_trained_parameters(cache: str, tmp_path: Path) -> None:
    plain = train(cache, tmp_path / "plain", max_steps=1, **LORA)
    merged = train(cache, tmp_path / "merged", max_steps=1, merge_adapter=True, **LORA)
    assert (merged.num_trained, merged.num_parameters) == (
        plain.num_trained,
        plain.num_parameters,
    ) and plain.num_trained > 0


def test_the_card_of_an_adapter_that_is_trained_on_is_an_adapters(cache: str, tmp_path: Path) -> None:
    first = train(cache, tmp_path / "first", max_steps=1, **LORA)
    second = train(cache, tmp_path / "second", max_steps=1, model=first.model)
    card = Path(str(second.model), "README.md").read_text()
    assert (
        "library_name: peft" in card
        and "an adapter (LORA, rank 4)" in card
        and "An adapter for `first`" in card
    )


def test_an_adapter_whose_base_or_weights_are_gone_is_an_error(cache: str, tmp_path: Path) -> None:
    trained = Path(train(cache, tmp_path / "run", max_steps=1, **LORA).model)
    config = json.loads((trained / "adapter_config.json").read_text())
    (trained / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/nowhere/base"})
    )
    with pytest.raises(ModelError, match=r"its base /nowhere/base is gone.\nCorrect base_model_name_or_path"):
        train(cache, tmp_path / "next", model=str(trained))
    (trained / "adapter_config.json").write_text(json.dumps(config))
    (trained / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="adapter_model.safetensors is missing"):
        train(cache, tmp_path / "next", model=str(trained))


def test_the_random_part_of_an_adapter_depends_only_on_the_seed(cache: str, tmp_path: Path) -> None:
    found = []
    for name, global_seed in (("a", 0), ("b", 99)):
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        train(cache, tmp_path / name, max_steps=1, **LORA)
        assert torch.equal(before, torch.random.get_rng_state())
        found.append(adapter_weights(tmp_path / name / "model"))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_the_best_adapter_is_merged_under_patience(cache: str, tmp_path: Path) -> None:
    options = {
        "eval_pairs": "heldout",
        "eval_every": 1,
        "patience": 1,
        "max_steps": 8,
        "lora_r": 4,
        "lr": 0.1,
        "warmup_ratio": 0.0,
        "epochs": 9.0,
    }
    report = train(cache, tmp_path / "run", merge_adapter=True, **options)
    assert report.stopped_by_patience and report.best is not None and report.best["step"] < report.num_steps
    line = next(
        entry
        for entry in metrics(tmp_path / "run")
        if "eval/loss" in entry and entry["step"] == report.best["step"]
    )
    assert report.eval_after == line
    model = AutoModelForCausalLM.from_pretrained(report.model)
    pairs = list(open_cache(cache).pairs("heldout"))
    logps = [float(naive_token_logps(model, entry.pair.chosen).sum()) for entry in pairs]
    assert sum(logps) / len(logps) == pytest.approx(line["eval/logps/chosen"], rel=1e-4)
    assert "model.embed_tokens.weight" in weights(report.model)
