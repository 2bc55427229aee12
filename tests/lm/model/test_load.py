"""Configs that transformers refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from dpo_cache.errors import DpoCacheError, ModelError
from dpo_cache.lm.model.identity import reference_identity
from dpo_cache.lm.model.load import load_config
from tests.conftest import make_llama
from tests.lm.model.adapters import save_adapter


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": "wide"}, ["hidden_size", "wide"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "2.5"]),
        ({"hidden_size": 30, "num_attention_heads": 4}, ["hidden size (30)", "heads (4)"]),
        ({"vocab_size": None}, ["vocab_size", "None"]),
        ({"layer_types": ["full_attention", "sideways_attention"]}, ["layer_types", "sideways_attention"]),
        ({"model_type": "unheard_of"}, ["unheard_of"]),
        ({"auto_map": ["m.M"]}, ["auto_map", "m.M", "an object that names classes"]),
        ({"auto_map": {"AutoConfig": ["m.M"]}}, ["AutoConfig in auto_map", "m.M"]),
        ({"text_config": 3}, ["text_config", "3", "llama does not have"]),
        ({"text_config": {"a": 3}}, ["text_config", "{'a': 3}"]),
        ({"architectures": 3}, ["architectures", "3", "a list of names"]),
        ({"architectures": [3]}, ["architectures", "[3]"]),
    ],
    ids=lambda value: ", ".join(value),
)
def test_a_config_that_is_refused_is_an_error_with_its_field_and_value(
    fields: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    config = hf.LlamaConfig(num_hidden_layers=2).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ModelError) as caught:
        load_config(str(tmp_path))
    first, *_ = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}: no model can be loaded from it (")
    assert all(part in first for part in named), first


STRANGE = (None, 3, "x", [], ["m.M"], {}, {"a": 3}, True)
FILES = ("config.json", "model.safetensors.index.json", "generation_config.json", "adapter_config.json")


@pytest.fixture(scope="module")
def with_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sharded model, with that of an adapter over it inside."""
    folder = tmp_path_factory.mktemp("model")
    make_llama().save_pretrained(folder, max_shard_size="20KB")
    save_adapter(folder, folder / "adapter")
    return folder


@pytest.mark.rotating(2)
@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about such values
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_value_of_a_wrong_kind_in_a_file_is_an_error_of_our_own_or_does_no_harm(
    with_adapter: Path, name: str, every: int
) -> None:
    folder = with_adapter / "adapter" if name.startswith("adapter") else with_adapter
    text = (folder / name).read_text()
    more = ["auto_map", "quantization_config", "transformers_weights", "text_config", "revision"]
    fields = json.loads(text)
    wrong = [json.dumps(value) for value in STRANGE] + ["{", "", "\x00"]
    wrong += [json.dumps({**fields, key: value}) for key in [*fields, *more] for value in STRANGE]
    num_refused = 0
    try:
        for content in wrong[::every]:
            (folder / name).write_text(content)
            try:
                reference_identity(str(folder), load_config(str(folder)), torch.float32)
            except DpoCacheError:
                num_refused += 1
    finally:
        (folder / name).write_text(text)
    assert num_refused > 0 or name == "generation_config.json"
