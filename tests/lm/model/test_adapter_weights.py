"""Saved adapters in their models: as PEFT loads them, or an error that names what does not fit."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.adapter import add_adapter, can_be_switched_off, is_identity_at_init
from dpo_cache.lm.model.adapter_weights import load_adapter
from dpo_cache.lm.model.load import load_base, load_config, load_model, locate_checkpoint
from tests.conftest import make_llama
from tests.lm.model.adapters import (
    LORA,
    WEIGHTS,
    edit_config,
    edit_tensors,
    identity,
    logps,
    logps_by_peft,
    save_adapter,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter") / "lora")


def refused(folder: Path, message: str) -> None:
    """Both identifying and loading raise this error."""
    with pytest.raises(ModelError, match=message):
        identity(folder)
    with pytest.raises(ModelError, match=message):
        load_model(str(folder), dtype=torch.float32, device=CPU)


def test_an_adapter_is_loaded_as_peft_loads_it(base: Path, adapter: Path) -> None:
    assert torch.equal(logps(adapter), logps_by_peft(base, adapter))


@pytest.mark.parametrize("init_lora_weights", [True, False])
def test_missing_tensors_are_named(adapter: Path, tmp_path: Path, init_lora_weights: bool) -> None:
    half = edit_tensors(
        adapter, tmp_path / "half", lambda kept: {k: v for k, v in kept.items() if "q_proj" in k}
    )
    refused(
        edit_config(half, tmp_path / "changed", init_lora_weights=init_lora_weights),
        r"adapter_model.safetensors: 4 of the adapter's tensors missing, which would be random: "
        r"base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight, ",
    )


def test_tensors_that_match_nothing_are_named(adapter: Path, tmp_path: Path) -> None:
    def rename(kept: dict) -> dict:
        return {name.replace("q_proj", "other").replace("v_proj", "more"): one for name, one in kept.items()}

    refused(
        edit_tensors(adapter, tmp_path / "renamed", rename),
        r"8 of the adapter's tensors missing.* and 4 more; 8 without a place in LlamaForCausalLM under its "
        r"adapter_config.json: base_model.model.model.layers.0.self_attn.more.lora_A.weight, ",
    )


@pytest.mark.parametrize("fields", [{"target_modules": ["q_proj"]}, {"layers_to_transform": [0]}], ids=str)
def test_an_adapter_of_which_a_part_would_be_applied_is_refused(
    adapter: Path, tmp_path: Path, fields: dict
) -> None:
    refused(edit_config(adapter, tmp_path / "changed", **fields), "4 without a place in LlamaForCausalLM")


def test_a_module_that_was_to_be_saved_and_is_missing_is_named(adapter: Path, tmp_path: Path) -> None:
    refused(
        edit_config(adapter, tmp_path / "changed", modules_to_save=["lm_head"]),
        r"1 of the adapter's tensors missing, which would be random: base_model.model.lm_head.weight.",
    )


def test_all_lines_of_pefts_error_are_shown(adapter: Path, tmp_path: Path) -> None:
    make_llama(hidden_size=16).save_pretrained(tmp_path / "small")
    changed = edit_config(adapter, tmp_path / "changed", base_model_name_or_path=str(tmp_path / "small"))
    with pytest.raises(ModelError) as caught:
        load_model(str(changed), dtype=torch.float32, device=CPU)
    problem, advice = str(caught.value).split("\n")
    assert "the adapter does not fit LlamaForCausalLM: Error(s) in loading state_dict" in problem
    assert "q_proj.lora_A.default.weight: copying a param with shape torch.Size([4, 32])" in problem
    assert "more lines)" in problem and advice.startswith("Give the base that it was trained on")


@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize(
    ("kind", "tensor", "fields"),
    [
        ("UNILORA", "unilora_theta_d", {"r": 4}),
        ("VBLORA", "vblora_vector_bank", {"r": 4, "vector_length": 8, "num_vectors": 16}),
        ("TINYLORA", "tinylora_v.3", {"r": 4}),
        ("SHIRA", "v_proj.shira_indices", {"r": 4}),
    ],
)
def test_a_tensor_that_layers_share_is_needed_once(
    base: Path, tmp_path: Path, kind: str, tensor: str, fields: dict
) -> None:
    make = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    config = make(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **fields)
    whole = save_adapter(base, tmp_path / "whole", config)
    assert torch.equal(logps(whole), logps_by_peft(base, whole))
    identity(whole)
    dropped = [name for name in load_file(whole / WEIGHTS) if name.endswith(tensor)][-1]
    half = edit_tensors(
        whole, tmp_path / "half", lambda kept: {k: v for k, v in kept.items() if k != dropped}
    )
    message = rf"1 of the adapter's tensors missing, which would be random: .*{tensor}"
    if kind == "SHIRA":  # PEFT cannot put it into a model without weights: only loading looks
        with pytest.raises(ModelError, match=message):
            load_model(str(half), dtype=torch.float32, device=CPU)
    else:
        refused(half, message)


def test_an_adapter_whose_first_weights_were_orthogonal_is_loaded(base: Path, tmp_path: Path) -> None:
    """PEFT leaves the base as it is there; the fresh adapter is not zero."""
    folder = save_adapter(base, tmp_path / "adapter", init_lora_weights="orthogonal")
    assert torch.equal(logps(folder), logps_by_peft(base, folder))
    assert identity(folder) == identity(edit_config(folder, tmp_path / "other", init_lora_weights=True))
    for start, is_zero in (("orthogonal", False), ("gaussian", True), (True, True), (False, False)):
        fresh = add_adapter(make_llama(), LoraConfig(**{**LORA, "init_lora_weights": start}), seed=0)
        assert is_identity_at_init(fresh) is is_zero


# -- a vocabulary of another size --------------------------------------------------------------------------


@pytest.mark.rotating(2)
@pytest.mark.parametrize("rows", [270, 260])
@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], None])
def test_an_adapter_over_a_resized_vocabulary_resizes_its_base(
    base: Path, tmp_path: Path, rows: int, saved: list[str] | None
) -> None:
    folder = save_adapter(base, tmp_path / "adapter", rows=rows, modules_to_save=saved)
    assert load_config(str(folder)).vocab_size == rows
    model = load_model(str(folder), dtype=torch.float32, device=CPU)
    assert model.get_input_embeddings().weight.shape[0] == rows == model.config.vocab_size
    assert torch.equal(logps(folder), logps_by_peft(base, folder, rows))
    assert len(identity(folder)["adapter"]["weights"]) == 64


def test_an_adapter_over_a_resized_vocabulary_of_tied_embeddings(tmp_path: Path) -> None:
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    folder = save_adapter(tmp_path / "tied", tmp_path / "adapter", rows=270)
    assert torch.equal(logps(folder), logps_by_peft(tmp_path / "tied", folder, 270))


def test_new_rows_that_are_not_in_the_adapter_are_refused(base: Path, tmp_path: Path) -> None:
    whole = save_adapter(base, tmp_path / "adapter", rows=270, modules_to_save=["embed_tokens", "lm_head"])
    half = edit_tensors(
        whole, tmp_path / "half", lambda kept: {k: v for k, v in kept.items() if "lm_head" not in k}
    )
    refused(
        half,
        "was trained on a vocabulary of 270 tokens, its base has 264, and the adapter has no rows of lm_head "
        "for the new ones.\nSave the adapter with its embeddings and its head",
    )


def test_resizing_leaves_the_random_state_as_it_was(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(base, tmp_path / "adapter", rows=270)
    before = torch.get_rng_state()
    identity(folder)
    load_model(str(folder), dtype=torch.float32, device=CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_adapter_with_weights_of_its_base_cannot_be_switched_off(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    resized = save_adapter(base, tmp_path / "adapter", rows=270)
    assert any("lora" not in name for name in load_file(resized / WEIGHTS))
    found = []
    for folder in (adapter, resized):
        model = load_base(locate_checkpoint(str(folder)), dtype=torch.float32, device=CPU)
        found.append(can_be_switched_off(load_adapter(model, str(folder))))
    assert found == [True, False]
