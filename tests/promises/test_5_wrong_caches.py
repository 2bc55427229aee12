"""Promise 5: a wrong cache is refused with the list of fields that differ; the same weights are recognised
under any name.
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import dpo_cache
from dpo_cache.errors import CacheError, ModelError, NewerFormatError, NotInCacheError
from dpo_cache.store import Cache
from tests.conftest import make_llama, make_tokenizer


@pytest.fixture
def cache(model_folder: str, data_file: str, tmp_path: Path) -> Path:
    dpo_cache.precompute(model_folder, data_file, tmp_path / "cache", name="pairs")
    return tmp_path / "cache"


def reference_of(cache: Path) -> str:
    (reference,) = Cache(cache).references()
    return reference


def save(folder: Path, seed: int = 0, **changes: object) -> Path:
    make_llama(seed, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def resharded(folder: Path, model_folder: str) -> Path:
    make_llama().save_pretrained(folder, max_shard_size="20KB")
    make_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def renamed(folder: Path, model_folder: str) -> Path:
    shutil.copytree(model_folder, folder)
    edit_json(folder / "config.json", _name_or_path="another/name", transformers_version="4.0.0")
    return folder


def downloaded_again(folder: Path, model_folder: str) -> Path:
    shutil.copytree(model_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        dict(reversed(tensors.items())),
        folder / "model.safetensors",
        metadata={"format": "pt", "made": "elsewhere"},
    )
    return folder


@pytest.mark.parametrize("again", [resharded, renamed, downloaded_again])
def test_the_same_weights_are_recognised(
    again, cache: Path, model_folder: str, data_file: str, tmp_path: Path
) -> None:
    folder = again(tmp_path / "again", model_folder)
    report = dpo_cache.precompute(folder, data_file, cache, name="pairs", reference=reference_of(cache))
    assert (report.reference, report.scored_now, report.attention) == (reference_of(cache), 0, None)
    remarks: list[str] = []
    dpo_cache.train(cache, tmp_path / "run", model=str(folder), max_steps=1, log=remarks.append)
    assert any("the policy is the reference" in remark for remark in remarks)


def other_weights(folder: Path, model_folder: str) -> tuple[Path, dict, str]:
    shutil.copytree(model_folder, folder)  # the same name, files and config
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.001
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, {}, "weights: "


def other_dtype(folder: Path, model_folder: str) -> tuple[Path, dict, str]:
    return Path(model_folder), {"dtype": "bfloat16"}, "dtype: float32 and bfloat16"


def other_quantization(folder: Path, model_folder: str) -> tuple[Path, dict, str]:
    shutil.copytree(model_folder, folder)
    edit_json(
        folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    return folder, {}, "quantization.load_in_4bit: none and True"


def other_config(folder: Path, model_folder: str) -> tuple[Path, dict, str]:
    shutil.copytree(model_folder, folder)
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    return folder, {}, "config.rms_norm_eps: none and 0.001"


@pytest.mark.parametrize("change", [other_weights, other_dtype, other_quantization, other_config])
def test_another_reference_is_refused_where_one_is_expected(
    change, cache: Path, model_folder: str, data_file: str, tmp_path: Path
) -> None:
    folder, options, line = change(tmp_path / "other", model_folder)
    with pytest.raises(ModelError) as caught:
        dpo_cache.precompute(
            folder, data_file, cache, name="pairs", reference=reference_of(cache)[:10], **options
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{folder} is not reference {reference_of(cache)[:12]} of {cache}: they differ in"
    assert any(shown.startswith(f"  {line}") for shown in lines[1:-1])
    assert len(Cache(cache).references()) == 1


def test_an_adapter_beside_the_weights_is_refused(
    cache: Path, model_folder: str, data_file: str, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "adapted")
    (tmp_path / "adapted" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ModelError, match="holds an adapter and whole weights, so it is not clear which is meant"
    ):
        dpo_cache.precompute(tmp_path / "adapted", data_file, cache)


def test_a_pair_set_that_is_replaced_says_which_fields_differ(
    cache: Path, data_file: str, tmp_path: Path
) -> None:
    remarks: list[str] = []
    other = save(tmp_path / "other", seed=1)
    with pytest.raises(CacheError, match="there is another pair set pairs/train, of 12 pairs.*\n  weights: "):
        dpo_cache.precompute(other, data_file, cache, name="pairs")
    dpo_cache.precompute(other, data_file, cache, name="pairs", overwrite=True, log=remarks.append)
    (remark,) = (remark for remark in remarks if "is replaced" in remark)
    assert "pair set pairs/train is replaced: it held 12 pairs of reference" in remark
    assert "; before and now differ in weights: " in remark


def test_a_pair_set_that_is_cut_otherwise_says_so(cache: Path, model_folder: str, data_file: str) -> None:
    remarks: list[str] = []
    dpo_cache.precompute(model_folder, data_file, cache, name="pairs", max_length=40, log=remarks.append)
    assert any(
        "before and now differ in tokenization.max_length: 1024 and 40." in remark for remark in remarks
    )


def test_training_on_a_reference_that_is_not_the_expected_one_is_refused(
    cache: Path, data_file: str, tmp_path: Path
) -> None:
    first = reference_of(cache)
    dpo_cache.precompute(save(tmp_path / "other", seed=1, rms_norm_eps=1e-3), data_file, cache, name="other")
    with pytest.raises(NotInCacheError) as caught:
        dpo_cache.train(cache, tmp_path / "run", pairs="other", reference=first[:12])
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(f"not by {first[:12]}; they differ in")
    assert (
        any(line.startswith("  weights: ") for line in lines)
        and "  config.rms_norm_eps: 0.001 and none" in lines
    )


def test_a_policy_that_starts_elsewhere_is_told_once_with_the_fields(cache: Path, tmp_path: Path) -> None:
    remarks: list[str] = []
    dpo_cache.train(
        cache, tmp_path / "run", model=str(save(tmp_path / "other", seed=1)), max_steps=2, log=remarks.append
    )
    told = [remark for remark in remarks if "is another model than the reference" in remark]
    assert len(told) == 1 and "they differ in weights: " in told[0]


def test_a_newer_format_is_refused_everywhere(
    cache: Path, model_folder: str, data_file: str, tmp_path: Path
) -> None:
    edit_json(cache / "format.json", version=2)
    for use in (
        lambda: dpo_cache.precompute(model_folder, data_file, cache),
        lambda: dpo_cache.train(cache, tmp_path / "run"),
        lambda: dpo_cache.open_cache(cache),
    ):
        with pytest.raises(NewerFormatError, match=r"cache format 2, this one reads 1"):
            use()
