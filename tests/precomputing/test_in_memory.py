"""Rows, models and tokenizers that are loaded already, and what is not loaded where nothing is missing."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import dpo_cache
from dpo_cache.errors import DataError, ModelError, OptionError
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.lm.model.loaded import identify_loaded
from dpo_cache.store import open_cache
from dpo_cache.store.upkeep.commands import precompute_line
from tests.conftest import chat_rows, make_llama, make_tokenizer
from tests.lm.families import make_model
from tests.precomputing.test_run import refuse_models, scored


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def load(folder: str, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


# -- rows --------------------------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "Dataset": Dataset.from_list,
    "formatted Dataset": lambda rows: Dataset.from_list(rows).with_format("numpy"),
    "IterableDataset": lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
    "generator": lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
    "DatasetDict": lambda rows: DatasetDict({"train": Dataset.from_list(rows)}),
    "list": lambda rows: rows,
    "tuple": tuple,
    "pandas": lambda rows: pd.DataFrame(rows, index=range(7, 7 + len(rows))),
    "polars": pl.DataFrame,
    "pyarrow": pa.Table.from_pylist,
}


@pytest.mark.rotating(3)
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_rows_make_the_pairs_that_their_file_makes(
    model_folder: str, data_file: str, cache: str, kind: str
) -> None:
    whole = dpo_cache.precompute(model_folder, data_file, cache)
    report = dpo_cache.precompute(model_folder, KINDS[kind](chat_rows()), cache, name="given")
    assert report.pair_sets == ["given/train"] and report.scored_now == 0
    assert report.surveys[0] | {"pair_set": ""} == whole.surveys[0] | {"pair_set": ""}
    assert scored(cache, "given") == scored(cache, "pairs")


def test_splits_limits_windows_and_renamed_columns_of_loaded_rows(model_folder: str, cache: str) -> None:
    rows = [{"question": f"{number}?", "good": " a", "bad": f" b{number}"} for number in range(9)]
    both = DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:4])})
    mapped = ("prompt=question", "chosen=good", "rejected=bad")
    report = dpo_cache.precompute(
        model_folder, both, cache, name="given", split=("train", "test"), limit=5, window=2, map=mapped
    )
    assert report.pair_sets == ["given/train", "given/test"]
    assert [survey["rows_read"] for survey in report.surveys] == [5, 4]
    with pytest.raises(DataError, match="list in memory: no split test.\nIt has: train."):
        dpo_cache.precompute(model_folder, rows, cache, name="given", split="test", map=mapped)


def test_loaded_rows_need_a_name(model_folder: str, cache: str) -> None:
    with pytest.raises(OptionError, match='have no name for their pair set.\nGive one: name="..."'):
        dpo_cache.precompute(model_folder, chat_rows(), cache)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "list in memory: split train has no rows"),
        ([1, 2], "list in memory: a value of type list is not read"),
        (7, "int in memory: a value of type int is not read"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": 1}, {"prompt": "a", "chosen": "b", "rejected": "c"}],
            r"(?s)1 row cannot be used .*`rejected` is a number, expected text: 1 row, number 0\n",
        ),
        ([{"prompt": "a"}], "list in memory: split train is not preference data: found the columns prompt"),
    ],
)
def test_rows_that_are_no_preference_data_are_refused(
    model_folder: str, cache: str, rows: Any, problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        dpo_cache.precompute(model_folder, rows, cache, name="given")
    assert not Path(cache).exists()


def test_the_manifest_and_its_command_say_that_rows_were_in_memory(model_folder: str, cache: str) -> None:
    dpo_cache.precompute(model_folder, chat_rows(), cache, name="given", max_length=100)
    opened = open_cache(cache)
    manifest = opened.pairs("given").manifest
    assert (manifest["source"]["dataset"], manifest["source"]["rows_of"]) == ("list in memory", "memory")
    line = precompute_line(cache, manifest, opened.read_reference(manifest["reference"]))
    before = scored(cache, "given")
    report = eval(line, {"dpo_cache": dpo_cache, "ROWS": chat_rows()})
    assert report.scored_now == 0 and scored(cache, "given") == before


# -- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unchanged_loaded_model_has_the_identity_of_its_folder(
    model_folder: str, data_file: str, cache: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dpo_cache.precompute(model_folder, data_file, cache, dtype=dtype)
    refuse_models(monkeypatch)
    remarks: list[str] = []
    model = load(model_folder, dtype=getattr(torch, dtype)).train()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    report = dpo_cache.precompute(
        model, data_file, cache, tokenizer=tokenizer, name="again", log=remarks.append
    )
    assert (report.reference, report.scored_now, remarks) == (first.reference, 0, [])
    manifests = [open_cache(cache).pairs(name).manifest for name in ("pairs", "again")]
    assert manifests[0]["tokenization"] == manifests[1]["tokenization"]


def test_a_loaded_model_scores_what_its_folder_scores_and_stays_as_it_was(
    model_folder: str, data_file: str, tmp_path: Path
) -> None:
    dpo_cache.precompute(model_folder, data_file, tmp_path / "folder")
    model = load(model_folder).train()
    report = dpo_cache.precompute(model, data_file, tmp_path / "memory", tokenizer=make_tokenizer())
    assert report.scored_now == 20 and report.attention == "forest"
    assert scored(str(tmp_path / "folder")) == scored(str(tmp_path / "memory"))
    assert model.training and model.config._attn_implementation == "sdpa"
    provenance = [
        open_cache(tmp_path / name).read_reference(report.reference)["provenance"]
        for name in ("folder", "memory")
    ]
    assert provenance[0]["model"] == provenance[1]["model"] == model_folder


def change_weight(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3


def change_config(model: PreTrainedModel) -> None:
    model.config.rms_norm_eps = 1e-3


def change_buffer(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq *= 1.5


def round_weights(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def round_buffers(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)


def tie_weights(model: PreTrainedModel) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def drop_layer(model: PreTrainedModel) -> None:
    del model.model.layers[-1]


def replace_activation(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()


def change_scaling(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def forget_folder(model: PreTrainedModel) -> None:
    model.name_or_path = model.config._name_or_path = ""


CHANGES: dict[str, tuple[Any, str]] = {
    "weight": (change_weight, "its tensor model.layers.1.mlp.up_proj.weight was changed"),
    "config": (change_config, "its config was changed"),
    "buffer": (change_buffer, "its buffer model.rotary_emb.inv_freq was changed"),
    "rounded": (round_weights, "its (tensor|buffer) .* was changed"),
    "rounded buffers": (round_buffers, "its buffer model.rotary_emb.inv_freq was changed"),
    "tied": (tie_weights, "its tensor lm_head.weight was changed"),
    "layer": (drop_layer, "its tensor model.layers.1.* was added, removed or has another shape"),
    "activation": (replace_activation, "its module model.layers.1.mlp.act_fn was changed"),
    "scaling": (change_scaling, "its module model.layers.0.self_attn was changed"),
    "no folder": (forget_folder, "it names no checkpoint"),
}


@pytest.mark.rotating(2)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_a_reference_of_its_own(model_folder: str, change: str) -> None:
    model = load(model_folder)
    assert identify_loaded(model)[1] is None
    changed, reason = CHANGES[change]
    changed(model)
    identity, difference = identify_loaded(model)
    assert identity["weights_of"] == "memory" and difference is not None
    assert re.fullmatch(reason, difference)


@pytest.mark.parametrize("change", [replace_activation, change_scaling, change_config])
def test_changes_of_modules_that_no_tensor_shows_give_another_identity(
    model_folder: str, change: Any
) -> None:
    """Also where neither model is its checkpoint."""
    model, other = load(model_folder), load(model_folder)
    for one in (model, other):
        change_weight(one)
    change(other)
    assert identify_loaded(model)[0] != identify_loaded(other)[0]


def test_a_config_that_was_changed_after_loading_is_not_that_of_a_model_built_from_it(
    model_folder: str,
) -> None:
    model, built = load(model_folder), load(model_folder, rms_norm_eps=1e-3)
    change_config(model)
    assert model.config.rms_norm_eps == built.config.rms_norm_eps
    assert identify_loaded(model)[0] != identify_loaded(built)[0]


def test_scores_of_a_changed_model_are_its_own_and_are_found_again(
    model_folder: str, data_file: str, cache: str
) -> None:
    first = dpo_cache.precompute(model_folder, data_file, cache)
    remarks: list[str] = []
    model, tokenizer = load(model_folder), make_tokenizer()
    change_weight(model)
    options: dict[str, Any] = {"tokenizer": tokenizer, "name": "changed", "log": remarks.append}
    report = dpo_cache.precompute(model, data_file, cache, **options)
    assert report.reference != first.reference and report.scored_now == 20 and report.start_from is None
    assert remarks == [
        f"the model is a separate reference, not the one at {model_folder}: its tensor "
        "model.layers.1.mlp.up_proj.weight was changed."
    ]
    assert dpo_cache.precompute(model, data_file, cache, **options).scored_now == 0
    opened = open_cache(cache)
    document, manifest = opened.read_reference(report.reference), opened.pairs("changed").manifest
    assert document["provenance"]["model"] is None
    assert document["provenance"]["described"] == f"LlamaForCausalLM in memory, loaded from {model_folder}"
    line = precompute_line(cache, manifest, document)
    again = eval(line, {"dpo_cache": dpo_cache, "MODEL": model, "TOKENIZER": tokenizer})
    assert (again.reference, again.scored_now) == (report.reference, 0)
    with pytest.raises(ModelError, match="^the reference was a model in memory, not a checkpoint"):
        dpo_cache.train(cache, Path(cache).parent / "run", pairs="changed", log=lambda _: None)


@pytest.mark.rotating(3)
@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma3", "deepseek_v3", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families_whose_checkpoints_have_other_names_or_tied_weights_are_known_again(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    make_model(family).save_pretrained(tmp_path / "model")
    assert identify_loaded(load(str(tmp_path / "model"), dtype=dtype))[1] is None


def test_a_model_that_was_never_saved_is_a_reference(data_file: str, cache: str) -> None:
    remarks: list[str] = []
    model, tokenizer = make_llama(), make_tokenizer()
    report = dpo_cache.precompute(model, data_file, cache, tokenizer=tokenizer, log=remarks.append)
    assert report.scored_now == 20
    assert remarks == ["the model is a separate reference: it names no checkpoint."]
    same = dpo_cache.precompute(make_llama(), data_file, cache, tokenizer=tokenizer, log=remarks.append)
    other = dpo_cache.precompute(
        make_llama(seed=1), data_file, cache, tokenizer=tokenizer, name="other", log=remarks.append
    )
    assert (same.reference, same.scored_now) == (report.reference, 0)
    assert other.reference != report.reference and other.scored_now == 20


def test_what_only_applies_to_loading_is_refused_for_a_loaded_model(
    model_folder: str, data_file: str, cache: str
) -> None:
    model, tokenizer = load(model_folder), make_tokenizer()
    with pytest.raises(OptionError, match="comes without its tokenizer"):
        dpo_cache.precompute(model, data_file, cache)
    with pytest.raises(OptionError, match="dtype bfloat16: the model is loaded already, with dtype float32"):
        dpo_cache.precompute(model, data_file, cache, tokenizer=tokenizer, dtype="bfloat16")
    with pytest.raises(OptionError, match="quantize 4bit: the model is loaded already"):
        dpo_cache.precompute(model, data_file, cache, tokenizer=tokenizer, quantize="4bit")
    with pytest.raises(OptionError, match="a Linear cannot be the reference"):
        dpo_cache.precompute(torch.nn.Linear(1, 1), data_file, cache, tokenizer=tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="weights that are not in memory"):
        dpo_cache.precompute(model.to("meta"), data_file, cache, tokenizer=tokenizer, device="auto")


def test_a_model_with_an_adapter_in_it_is_refused(model_folder: str, data_file: str, cache: str) -> None:
    model = load(model_folder)
    add_adapter(model, lora_config(2, None, "all-linear"), seed=0)
    with pytest.raises(ModelError, match="it has an adapter in it.*\nMerge the adapter"):
        dpo_cache.precompute(model, data_file, cache, tokenizer=make_tokenizer())


def test_a_loaded_tokenizer_is_used_as_it_is_and_keeps_its_template(
    model_folder: str, data_file: str, cache: str, tmp_path: Path
) -> None:
    tokenizer, template = make_tokenizer(), tmp_path / "template.jinja"
    before = tokenizer.chat_template
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    dpo_cache.precompute(model_folder, data_file, cache, tokenizer=tokenizer, chat_template=str(template))
    assert tokenizer.chat_template == before
    made_with = open_cache(cache).pairs("pairs").manifest["tokenization"]
    assert (made_with["tokenizer"], made_with["chat_template"]) == ("in memory", template.read_text())


# -- what is imported --------------------------------------------------------------------------------------


def test_a_run_that_has_nothing_to_score_imports_no_model_code(
    model_folder: str, data_file: str, cache: str
) -> None:
    dpo_cache.precompute(model_folder, data_file, cache)
    code = f"""
import sys
import dpo_cache
report = dpo_cache.precompute({model_folder!r}, {data_file!r}, {cache!r}, name="again")
assert (report.scored_now, report.pairs_kept, report.attention) == (0, 12, None)
found = [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
assert found in ([], ["transformers.models.auto.modeling_auto"]), found  # a table of names
ours = {{"runner", "self_check", "scoring", "rows", "prepare", "policy", "kernels", "forest.attention"}}
found = {{name for name in ours if f"dpo_cache.lm.{{name}}" in sys.modules}}
assert not found and "transformers.modeling_utils" not in sys.modules and "peft" not in sys.modules, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
