"""Scores under a former id are recognized: they are computed again with a remark, and their pairs are still used."""

import json
from pathlib import Path

import pytest
import torch

import dpo_cache
from dpo_cache.lm.model.adapter import locate_checkpoint
from dpo_cache.lm.model.former_identity import former_identity
from dpo_cache.lm.model.load import load_config
from dpo_cache.precomputing import reference as reference_module
from dpo_cache.precomputing.rescore import rescore
from dpo_cache.store.format.documents import digest_json
from dpo_cache.training.loop import train
from tests.conftest import chat_rows, make_llama, make_tokenizer, write_rows
from tests.lm.model.adapters import save_adapter
from tests.lm.model.test_code_digest import MODELING, write


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def former(folder: Path) -> dict:
    location = str(folder)
    return former_identity(locate_checkpoint(location), load_config(location), torch.float32, "none")


def score_formerly(
    folder: Path, data: str, cache: Path, monkeypatch: pytest.MonkeyPatch, **options: object
) -> str:
    """Score as a version did that gave the former id."""
    with monkeypatch.context() as patch:
        patch.setattr(
            reference_module, "reference_identity", lambda location, *_, **__: former(Path(location))
        )
        return dpo_cache.precompute(str(folder), data, cache, name="pairs", **options).reference


def test_an_adapter_gets_a_new_id_once_with_a_remark(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, cache = save_adapter(base, tmp_path / "adapter"), tmp_path / "cache"
    data = write_rows(tmp_path / "pairs.jsonl", chat_rows(4))
    before = score_formerly(adapter, data, cache, monkeypatch)
    assert before == digest_json(former(adapter))
    again = dpo_cache.precompute(str(adapter), data, cache, name="again")
    (remark,) = [text for text in again.remarks if "another id" in text]
    assert remark == (
        f"{adapter} has another id than before ({before[:12]}, now {again.reference[:12]}): which modules its "
        "adapter is applied to, and how, is a part of the id now. The scores under its former id could be those "
        "of another model, so its completions are scored again; `dpo-cache rm` removes them."
    )
    assert again.scored_now == again.distinct_completions > 0
    third = dpo_cache.precompute(str(adapter), data, cache, name="third")
    assert (third.reference, third.scored_now) == (again.reference, 0)
    assert not [text for text in third.remarks if "another id" in text]


def test_remote_code_gets_a_new_id_once_with_a_remark(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = base / "config.json"
    auto_map = {"AutoModelForCausalLM": "modeling_scaled.ScaledLlama"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}))
    write(base, {"modeling_scaled.py": MODELING, "factors.py": "FACTOR = 1.0\n"})
    data, cache = write_rows(tmp_path / "pairs.jsonl", chat_rows(4)), tmp_path / "cache"
    trusted = {"trust_remote_code": True}
    before = score_formerly(base, data, cache, monkeypatch, **trusted)
    again = dpo_cache.precompute(str(base), data, cache, name="again", **trusted)
    assert before != again.reference
    (remark,) = [text for text in again.remarks if "another id" in text]
    assert "its own code, which `trust_remote_code` runs, is a part of the id now" in remark


def test_a_plain_checkpoint_keeps_its_id_without_a_remark(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = write_rows(tmp_path / "pairs.jsonl", chat_rows(4)), tmp_path / "cache"
    before = score_formerly(base, data, cache, monkeypatch)
    again = dpo_cache.precompute(str(base), data, cache, name="again")
    assert (again.reference, again.scored_now, again.remarks) == (before, 0, [])


def test_pairs_that_were_scored_under_a_former_id_are_those_of_their_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, cache = save_adapter(base, tmp_path / "adapter"), tmp_path / "cache"
    data = write_rows(tmp_path / "pairs.jsonl", chat_rows(6))
    before = score_formerly(adapter, data, cache, monkeypatch)
    reports = rescore(cache, str(adapter), 4)
    assert [report.reference for report in reports] == [before] and reports[0].agrees
    found = dpo_cache.evaluate(cache, model=str(adapter), pairs="pairs")
    assert not [text for text in found.remarks if "differ" in text or "another model" in text]
    run = train(cache, tmp_path / "run", pairs="pairs", max_steps=1, batch_size=2, precision="fp32")
    assert run.step_zero_gap is not None and run.step_zero_gap < 1e-3
    assert not [text for text in run.remarks if "another model than the reference" in text]


def test_the_former_form_does_not_follow_what_is_applied(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    entry = former(adapter)["adapter"]
    assert set(entry) == {"weights", "config"}
    assert entry["config"] == {"peft_type": "LORA", "r": 4}  # 8, its alpha, is PEFT's default
