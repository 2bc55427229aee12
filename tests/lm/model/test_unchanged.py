"""A run reads one model: files that are replaced while it does are refused, and a Hub model has one commit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dpo_cache
from dpo_cache.errors import ModelError
from dpo_cache.lm.model import unchanged
from dpo_cache.lm.model.identity import provenance, reference_identity
from dpo_cache.lm.model.load import load_config, load_model
from dpo_cache.lm.model.unchanged import check_not_rewritten, check_unchanged, commit_of, one_checkpoint
from dpo_cache.store import open_cache
from tests.conftest import chat_rows, make_llama, make_tokenizer, write_rows
from tests.lm.model.adapters import edit_config, save_adapter

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def identify(folder: Path) -> dict:
    return reference_identity(str(folder), load_config(str(folder)), torch.float32)


def load(folder: Path) -> torch.nn.Module:
    return load_model(str(folder), dtype=torch.float32, device=CPU)


def rewrite_weights(folder: Path) -> None:
    make_llama(seed=1).save_pretrained(folder)


def rewrite_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-2}))


def touch(folder: Path) -> None:
    os.utime(folder / "model.safetensors")


def add_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))


@pytest.mark.parametrize("change", [rewrite_weights, rewrite_config, touch, add_index])
def test_a_file_that_changes_between_hashing_and_loading_is_refused(saved: Path, change: object) -> None:
    with one_checkpoint():
        identify(saved)
        change(saved)
        with pytest.raises(ModelError, match="was changed while the model was read"):
            load(saved)
    with one_checkpoint():  # another run
        identify(saved)
        load(saved)


def test_an_adapter_that_changes_between_hashing_and_loading_is_refused(saved: Path, tmp_path: Path) -> None:
    adapter = save_adapter(saved, tmp_path / "adapter")
    other = save_adapter(saved, tmp_path / "other", lora_alpha=16)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with one_checkpoint():
            identify(adapter)
            shutil.copy(other / name, adapter / name)
            with pytest.raises(ModelError, match=f"{name} was changed while the model was read"):
                load(adapter)


def test_a_link_or_another_mode_is_no_change_and_a_rewritten_file_with_its_old_time_is(saved: Path) -> None:
    weights = saved / "model.safetensors"
    with one_checkpoint():
        identify(saved)
        os.link(weights, saved.parent / "link")
        check_unchanged()
        weights.chmod(0o600)
        check_unchanged()
        load(saved)
    with one_checkpoint():
        identify(saved)
        status = weights.stat()
        weights.write_bytes(bytes(status.st_size))
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(ModelError, match="was changed while the model was read"):
            check_unchanged()


def test_nothing_is_remembered_outside_of_a_run(saved: Path) -> None:
    identify(saved)
    rewrite_weights(saved)
    load(saved)
    check_unchanged()


def test_a_run_in_a_run_belongs_to_it(saved: Path) -> None:
    with one_checkpoint():
        with one_checkpoint():
            identify(saved)
        rewrite_weights(saved)
        with pytest.raises(ModelError, match="was changed"):
            check_unchanged()


def test_precompute_publishes_nothing_of_a_model_that_changes(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained

    def save_first(*given: object, **options: object) -> object:  # as a training run does at that moment
        rewrite_weights(saved)
        return real(*given, **options)

    data = write_rows(tmp_path / "pairs.jsonl", chat_rows(4))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", save_first)
    with pytest.raises(ModelError, match="was changed while the model was read"):
        dpo_cache.precompute(str(saved), data, tmp_path / "cache", name="pairs")
    assert not (tmp_path / "cache" / "references").exists() and not (tmp_path / "cache" / "pairs").exists()


def overwrite(path: Path) -> None:
    """Change the content of the file that is there, as safetensors does when it saves."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)


def test_a_file_that_is_overwritten_under_a_model_is_refused_and_one_that_is_replaced_is_not(
    saved: Path,
) -> None:
    path = saved / "model.safetensors"
    with one_checkpoint():
        identify(saved)
        load(saved)
        check_not_rewritten()
        shutil.copy(path, saved / "copy")
        (saved / "copy").replace(path)
        check_not_rewritten()
    with one_checkpoint():
        identify(saved)
        overwrite(path)
        with pytest.raises(ModelError, match="model.safetensors was overwritten while the model ran"):
            check_not_rewritten()
    check_not_rewritten()


def test_scores_of_weights_that_are_overwritten_meanwhile_are_not_published(
    saved: Path, tmp_path: Path
) -> None:
    data, changed = write_rows(tmp_path / "pairs.jsonl", chat_rows(4)), []

    def change_once(_: object) -> None:
        if not changed:
            changed.append(overwrite(saved / "model.safetensors"))

    with pytest.raises(ModelError, match="was overwritten while the model ran"):
        dpo_cache.precompute(str(saved), data, tmp_path / "cache", name="pairs", on_progress=change_once)
    assert changed and not (tmp_path / "cache" / "pairs").exists()


# -- the Hub -----------------------------------------------------------------------------------------------


class Hub:
    """The local copy of a Hub model, whose branch main can move."""

    name = "someone/tiny"

    def __init__(self, home: Path):
        self.folder = home / "models--someone--tiny"
        (self.folder / "refs").mkdir(parents=True)

    def push(self, commit: str, source: Path) -> None:
        shutil.copytree(source, self.folder / "snapshots" / commit)
        (self.folder / "refs" / "main").write_text(commit)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    import transformers.utils.hub as transformers_hub

    if hasattr(transformers_hub, "constants"):
        monkeypatch.setattr(transformers_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return Hub(tmp_path / "hub")


FIRST, SECOND = "a" * 40, "b" * 40


def test_a_branch_is_resolved_once_in_a_run(hub: Hub, saved: Path) -> None:
    hub.push(FIRST, saved)
    with one_checkpoint():
        assert commit_of(hub.name, None) == commit_of(hub.name, "main") == FIRST
        hub.push(SECOND, saved)
        assert commit_of(hub.name, None) == FIRST
        place = provenance(hub.name, revision=None, device=CPU, attention="auto", tokenizer=hub.name)
        assert place["revision"] == FIRST
    with one_checkpoint():
        assert commit_of(hub.name, None) == SECOND
    assert commit_of(hub.name, FIRST) == FIRST
    assert commit_of(str(saved), "any") == "any" and commit_of("nobody/nothing", None) is None


def test_a_branch_that_moves_in_a_run_is_scored_at_its_first_commit(
    hub: Hub, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    hub.push(FIRST, saved)
    real = AutoModelForCausalLM.from_pretrained

    def push_first(*given: object, **options: object) -> object:
        if not (hub.folder / "snapshots" / SECOND).exists():
            make_llama(seed=1).save_pretrained(tmp_path / "second")
            make_tokenizer().save_pretrained(tmp_path / "second")
            hub.push(SECOND, tmp_path / "second")
        return real(*given, **options)

    data = write_rows(tmp_path / "pairs.jsonl", chat_rows(4))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", push_first)
    report = dpo_cache.precompute(hub.name, data, tmp_path / "cache", name="hub")
    assert (hub.folder / "snapshots" / SECOND).exists()
    entry = open_cache(tmp_path / "cache").read_reference(report.reference)
    assert (entry["provenance"]["model"], entry["provenance"]["revision"]) == (hub.name, FIRST)
    local = dpo_cache.precompute(str(saved), data, tmp_path / "local", name="hub")
    assert local.reference == report.reference  # and the same scores
    for name in ("cache", "local"):
        pairs = open_cache(tmp_path / name).pairs("hub")
        assert [scored.ref_chosen.logps for scored in pairs] == pytest.approx(
            [scored.ref_chosen.logps for scored in open_cache(tmp_path / "local").pairs("hub")]
        )
    moved = dpo_cache.precompute(hub.name, data, tmp_path / "cache", name="moved")
    assert moved.reference != report.reference


def test_the_base_of_an_adapter_is_pinned_too(hub: Hub, saved: Path, tmp_path: Path) -> None:
    from dpo_cache.lm.model.adapter import locate_checkpoint

    hub.push(FIRST, saved)
    adapter = save_adapter(saved, tmp_path / "adapter")
    adapter = edit_config(adapter, tmp_path / "on-hub", base_model_name_or_path=hub.name)
    with one_checkpoint():
        assert locate_checkpoint(str(adapter)).base_revision == FIRST
        hub.push(SECOND, saved)
        assert locate_checkpoint(str(adapter)).base_revision == FIRST


def test_a_stamp_notices_a_file_of_the_same_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    before = unchanged.stamp(path)
    status = path.stat()
    (tmp_path / "new").write_text("two")
    (tmp_path / "new").replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert unchanged.stamp(path) != before
    save_file({"a": torch.ones(1)}, path)
    path.unlink()
    with pytest.raises(ModelError, match="the file is gone"):
        unchanged.stamp(path)
