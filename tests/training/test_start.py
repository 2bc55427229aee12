"""The model that a run starts from, and whose code runs: a cache that somebody else made gives no orders."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.errors import DpoCacheError, ModelError
from dpo_cache.options.train import TrainOptions
from dpo_cache.store import open_cache
from dpo_cache.store.format.documents import open_sealed, seal_document
from dpo_cache.tokenizer import load_tokenizer
from dpo_cache.training.start import Start, find_start, is_same_place, trusts_code
from tests.conftest import write_rows

CODE = "from pathlib import Path\nPath({marker!r}).touch()\nfrom transformers import {base}\nclass Own({base}):\n    pass\n"


def change(path: Path, **members: dict) -> None:
    """Somebody else's edit of a sealed document."""
    document = open_sealed(path.read_bytes(), "there")
    path.write_bytes(
        seal_document(
            {
                name: {**value, **members.get(name, {})} if isinstance(value, dict) else value
                for name, value in document.items()
            }
        )
    )


@pytest.fixture
def strange(cache: str, tmp_path: Path) -> Path:
    shutil.copytree(cache, tmp_path / "strange")
    return tmp_path / "strange"


@pytest.fixture
def hostile(model_folder: str, tmp_path: Path) -> Path:
    """A model whose config and tokenizer come with code that leaves a file."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "hostile"))
    for name, base, entries in (
        ("config.json", "LlamaConfig", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
        ("tokenizer_config.json", "PreTrainedTokenizerFast", {"AutoTokenizer": [None, "own_tokens.Own"]}),
    ):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": entries}))
        module = "own.py" if name == "config.json" else "own_tokens.py"
        (folder / module).write_text(CODE.format(marker=str(tmp_path / "ran"), base=base))
    return folder


def reference_file(cache: Path) -> Path:
    (reference,) = open_cache(cache).references()
    return cache / "references" / reference / "reference.json"


def test_trust_does_not_cover_the_tokenizer_that_a_manifest_names(
    strange: Path, hostile: Path, model_folder: str, tmp_path: Path
) -> None:
    tokenization = {"tokenizer": str(hostile), "tokenizer_sha256": "0" * 64}
    change(strange / "pairs/pairs/train/manifest.json", tokenization=tokenization)
    dpo_cache.train(
        strange, tmp_path / "run", pairs="pairs", model=model_folder, trust_remote_code=True, dry_run=True
    )
    assert not (tmp_path / "ran").exists()
    load_tokenizer(str(hostile), trust_remote_code=True)
    assert (tmp_path / "ran").exists()  # it does run where it may


def test_trust_does_not_cover_the_model_that_a_cache_names(
    strange: Path, hostile: Path, tmp_path: Path
) -> None:
    change(reference_file(strange), provenance={"model": str(hostile)})
    remarks: list[str] = []
    options = {"pairs": "pairs", "trust_remote_code": True, "dry_run": True}
    with suppress(DpoCacheError):  # the model may not be loadable without its code
        dpo_cache.train(strange, tmp_path / "run", **options, log=remarks.append)
    assert not (tmp_path / "ran").exists()
    assert remarks[0] == f"the policy starts from {hostile}, which the cache names; `model` chooses another."
    assert remarks[1].startswith("`trust_remote_code` runs only code of a place that you name with `model`")


def test_trust_covers_the_model_that_the_user_names() -> None:
    options = TrainOptions(cache="c", output="o", model="m", trust_remote_code=True)
    assert trusts_code(options, Start("m", None, is_named=True))
    assert not trusts_code(options, Start("m", None, is_named=False))
    assert not trusts_code(TrainOptions(cache="c", output="o", model="m"), Start("m", None, is_named=True))


def test_a_config_of_another_run_does_not_switch_trust_on(tmp_path: Path) -> None:
    from dpo_cache.options.run_config import with_config

    path, remarks = tmp_path / "config.json", []
    path.write_text(json.dumps({"model": "m", "trust_remote_code": True}))
    given = {"cache": "c", "output": "o", "config": str(path)}
    assert with_config(given, remarks.append)["trust_remote_code"] is False
    assert "its `trust_remote_code` is not used" in remarks[0]
    assert with_config({**given, "trust_remote_code": True})["trust_remote_code"] is True


def test_the_default_start_is_logged_first_and_a_strangers_relative_path_is_refused(
    cache: str, strange: Path, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remarks: list[str] = []
    options = TrainOptions(cache=cache, output="o")
    opened = open_cache(cache)
    reference = opened.read_reference(opened.references()[0])
    start = find_start(options, reference, remarks.append, is_resumed=False)
    assert start == Start(model_folder, None, is_named=False)
    assert remarks == [
        f"the policy starts from {model_folder}, which the cache names; `model` chooses another."
    ]
    monkeypatch.chdir(Path(model_folder).parent)
    change(reference_file(strange), provenance={"model": Path(model_folder).name})
    with pytest.raises(ModelError, match="a relative path, and this user did not make its entry"):
        dpo_cache.train(strange, tmp_path / "run", pairs="pairs", dry_run=True)


def test_places_are_compared_by_what_they_lead_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert is_same_place("m", str(tmp_path / "link")) and is_same_place("owner/m", "owner/m")
    assert not is_same_place("m", "owner/m")


def test_ids_beyond_the_vocabulary_are_one_clear_error(
    strange: Path, model_folder: str, tmp_path: Path
) -> None:
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 263 + place], "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for place in range(2)]  # fmt: skip
    data = write_rows(tmp_path / "ids.jsonl", rows)
    dpo_cache.import_pairs(tmp_path / "cache", data, reference="theirs", name="ids")
    with pytest.raises(ModelError, match="row 1 of the data holds token id 264, but .* has 264 embeddings"):
        dpo_cache.train(tmp_path / "cache", tmp_path / "run", model=model_folder, dry_run=True)
