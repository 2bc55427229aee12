"""What PEFT applies counts, in whichever words a config says it; and nothing else."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file

from dpo_cache.errors import DpoCacheError
from dpo_cache.lm.model.adapter import UNSUITED
from dpo_cache.lm.model.adapter_identity import counted_fields
from tests.conftest import make_llama
from tests.lm.model.adapters import CONFIG, LORA, edit_config, edit_tensors, identity, logps, save_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter") / "lora")


def test_an_identity_names_what_is_applied(adapter: Path) -> None:
    entry = identity(adapter)["adapter"]
    assert entry["modules"] == 4
    assert entry["config"] == {"peft_type": "LORA", "r": 4, "scaling": 2.0}
    assert len(entry["weights"]) == len(entry["applied"]) == 64


@pytest.mark.rotating(3)
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["v_proj", "q_proj"]},
        {"target_modules": ".*(q|v)_proj"},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": [1, 0], "layers_pattern": "layers"},
        {"exclude_modules": ["lm_head"]},
        {"alpha_pattern": {"no_such_layer": 3}},
        {"rank_pattern": {"q_proj": 4}},
        {"lora_alpha": 4, "use_rslora": True},
        {"lora_alpha": 1, "alpha_pattern": {"q_proj": 8, "v_proj": 8}},
        {"lora_dropout": 0.5},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"inference_mode": False},
        {"peft_version": "0.1"},
        {"base_model_name_or_path": "relative"},
    ],
    ids=str,
)
def test_other_words_for_the_same_adapter_keep_its_identity(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict
) -> None:
    if "base_model_name_or_path" in fields:
        (tmp_path / "relative").symlink_to(base)
        monkeypatch.chdir(tmp_path)
    changed = edit_config(adapter, tmp_path / "changed", **fields)
    assert identity(changed) == identity(adapter)
    assert torch.equal(logps(changed), logps(adapter))


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 16},
        {"use_rslora": True},
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
        {"alpha_pattern": {"v_proj": 3}},
        {"lora_alpha": 1, "alpha_pattern": {"q_proj": 8}},
    ],
    ids=str,
)
def test_another_scaling_is_another_adapter(adapter: Path, tmp_path: Path, fields: dict) -> None:
    changed = edit_config(adapter, tmp_path / "changed", **fields)
    assert identity(changed) != identity(adapter)
    assert not torch.equal(logps(changed), logps(adapter))


def test_which_module_gets_a_scaling_counts_not_only_which_scalings_there_are(
    adapter: Path, tmp_path: Path
) -> None:
    one, other = (
        edit_config(adapter, tmp_path / name, alpha_pattern={name: 3}) for name in ("q_proj", "v_proj")
    )
    found = [identity(folder)["adapter"] for folder in (one, other)]
    assert found[0]["config"] == found[1]["config"] and found[0]["applied"] != found[1]["applied"]


def test_adapters_of_one_file_on_different_modules_differ(base: Path, tmp_path: Path) -> None:
    """Rows of embeddings that are trained: which ones is only in the config."""
    folders = []
    for name, tokens in (("one", [3, 5]), ("other", [3, 6])):
        folders.append(save_adapter(base, tmp_path / name, trainable_token_indices={"embed_tokens": tokens}))
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    changed = edit_tensors(folders[1], tmp_path / "same", lambda _: tensors[0])
    one, other = identity(folders[0])["adapter"], identity(changed)["adapter"]
    assert one["weights"] == other["weights"] and one != other


def test_the_dtype_in_which_an_adapter_is_stored_does_not_count(adapter: Path, tmp_path: Path) -> None:
    rounded = edit_tensors(
        adapter, tmp_path / "bf16", lambda kept: {k: v.bfloat16() for k, v in kept.items()}
    )
    widened = edit_tensors(rounded, tmp_path / "f32", lambda kept: {k: v.float() for k, v in kept.items()})
    assert identity(rounded) == identity(widened) != identity(adapter)
    assert torch.equal(logps(rounded), logps(widened))


def test_a_set_in_a_config_has_one_order(base: Path, tmp_path: Path) -> None:
    """PEFT writes the members of a set in any order; IA3 keeps two of them."""
    make = PEFT_TYPE_TO_CONFIG_MAPPING["IA3"]
    names = ["q_proj", "up_proj", "down_proj"]
    config = make(task_type="CAUSAL_LM", target_modules=names, feedforward_modules=names[1:])
    saved = save_adapter(base, tmp_path / "one", config)
    turned = edit_config(
        saved, tmp_path / "other", feedforward_modules=names[:0:-1], target_modules=names[::-1]
    )
    assert identity(saved) == identity(turned)
    assert identity(edit_config(saved, tmp_path / "third", feedforward_modules=[])) != identity(saved)


@pytest.mark.filterwarnings("ignore")  # PEFT's, of values that were not given
@pytest.mark.parametrize("kind", [kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value not in UNSUITED])
def test_rates_of_dropout_of_any_adapter_do_not_count(kind: PeftType) -> None:
    make = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    rates = {
        field.name: 0.25
        for field in dataclasses.fields(make)
        if "dropout" in field.name and isinstance(field.default, float)
    }
    if kind.value == "ADAMSS":
        pytest.importorskip("sklearn")
    config = make()
    before = counted_fields(config)
    for name, rate in rates.items():
        setattr(config, name, rate)
    assert counted_fields(config) == before and not rates.keys() & before.keys()


@pytest.mark.filterwarnings("ignore")  # PEFT's, of fields that do not go together
def test_a_field_of_lora_that_is_changed_gives_another_identity_or_a_refusal_or_the_same_log_probs(
    adapter: Path, tmp_path: Path
) -> None:
    before, expected, outcomes = identity(adapter), logps(adapter), {}
    for number, (name, value) in enumerate(LoraConfig(**LORA).to_dict().items()):
        for variant, changed in enumerate(_other_values(name, value)):
            folder = edit_config(adapter, tmp_path / f"{number}-{variant}", **{name: changed})
            try:
                is_same = identity(folder) == before
                found = logps(folder) if is_same else None
            except DpoCacheError:
                outcomes[name] = "refused"
                continue
            assert found is None or torch.equal(found, expected), (name, changed)
            outcomes.setdefault(name, "the same" if is_same else "another identity")
    assert outcomes["lora_alpha"] == "another identity" and outcomes["target_modules"] == "refused"
    assert outcomes["lora_dropout"] == "the same" and len(outcomes) > 30


def _other_values(name: str, value: object) -> list[object]:
    if name == "peft_type":
        return ["IA3", "LOHA"]
    if name == "target_modules":
        return [["q_proj"], ["q_proj", "v_proj", "k_proj"], "all-linear"]
    if name in ("layers_to_transform", "exclude_modules", "modules_to_save", "target_parameters"):
        return [[0], ["v_proj"], ["lm_head"]]
    if name in ("rank_pattern", "alpha_pattern"):
        return [{"v_proj": 2}]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1]
    return ["none", 1, None, {}]


def test_a_memo_of_another_adapter_is_not_used(adapter: Path, tmp_path: Path) -> None:
    folder = edit_config(adapter, tmp_path / "one")
    first = identity(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "lora_alpha": 32}))
    assert identity(folder)["adapter"]["config"]["scaling"] == 8.0
    (folder / CONFIG).write_text(json.dumps(config))
    assert identity(folder) == first
