"""Checkpoints with towers for images: the language model is trained, and the whole checkpoint is saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

import dpo_cache
from dpo_cache.store import open_cache
from dpo_cache.training.gradient_check import GradientCheck
from tests.conftest import chat_rows, make_tokenizer, naive_token_logps, write_rows
from tests.families.tiny import make_tiny
from tests.training.test_evaluations import LEARNING
from tests.training.test_loop import comparable, train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


PROCESSOR = {
    "preprocessor_config.json": '{"image_processor_type": "PixtralImageProcessor"}',
    "processor_config.json": '{"processor_class": "PixtralProcessor"}',
}


@pytest.fixture(autouse=True)
def no_gradient_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long, and has no part in files."""
    monkeypatch.setattr(GradientCheck, "problem", lambda *_: "")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Mistral 3 with its tower, its tokenizer and the files of its processor."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    make_tiny("mistral3").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for name, content in PROCESSOR.items():
        (folder / name).write_text(content)
    return str(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, whole: str) -> str:
    folder = tmp_path_factory.mktemp("trained")
    for name, rows in (("pairs", chat_rows(12)), ("heldout", chat_rows(4, seed=9))):
        dpo_cache.precompute(whole, write_rows(folder / f"{name}.jsonl", rows), str(folder / "cache"))
    return str(folder / "cache")


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors in the files of a checkpoint."""
    found = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def load(folder: str) -> torch.nn.Module:
    """The whole model; every weight of its class is in the checkpoint, and no other."""
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def assert_whole(folder: str, original: str) -> None:
    """The checkpoint has the original's names of tensors, its towers to the bit, its class and processor, and
    another language model.
    """
    before, after = tensors(original), tensors(folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("language_model" in name or "lm_head" in name for name in changed)
    config, expected = (json.loads(Path(one, "config.json").read_text()) for one in (folder, original))
    for name in ("architectures", "model_type"):
        assert config[name] == expected[name]
    for name, content in PROCESSOR.items():
        assert Path(folder, name).read_text() == content
    load(folder)


def test_scores_are_those_of_the_whole_model(cache: str, whole: str) -> None:
    model = load(whole)
    for example in open_cache(cache).pairs("heldout"):
        logps = naive_token_logps(model, example.pair.chosen)
        assert float(logps.sum()) == pytest.approx(example.ref_chosen.logps, abs=1e-3)


def test_the_whole_checkpoint_is_saved_also_by_a_resumed_run(cache: str, whole: str, tmp_path: Path) -> None:
    copy = shutil.copytree(whole, tmp_path / "model")
    options = {
        "model": str(copy),
        "max_steps": 4,
        "save_every": 2,
        "eval_every": 2,
        "eval_pairs": "heldout",
        "keep": 1,
    }
    report = train(cache, tmp_path / "run", **options)
    assert report.finished and report.resolved["auto_class"] == "AutoModelForImageTextToText"
    assert_whole(report.model, whole)
    steps: list[int] = []
    stopped = train(
        cache,
        tmp_path / "cut",
        on_metrics=lambda line: steps.append(line["step"]),
        should_stop=lambda: max(steps) >= 3,
        **options,
    )
    assert not stopped.finished
    shutil.rmtree(copy)  # a resumed run needs the cache only
    resumed = train(cache, tmp_path / "cut", resume=True, **options)
    assert_whole(resumed.model, whole)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "run")
    found, expected = tensors(resumed.model), tensors(report.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_best_policy_is_a_whole_checkpoint(cache: str, whole: str, tmp_path: Path) -> None:
    options = {**LEARNING, "max_steps": 4, "step_zero": "off"}
    report = train(cache, tmp_path / "run", **options)
    assert report.best_model is not None
    assert_whole(report.best_model, whole)
    other = train(cache, tmp_path / "other", patience=3, **options)
    assert other.best is not None and other.best["step"] < 4 and other.best_model is None
    found, expected = tensors(other.model), tensors(report.best_model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_is_on_the_language_model_and_loads_onto_the_whole(
    cache: str, whole: str, tmp_path: Path
) -> None:
    report = train(
        cache,
        tmp_path / "run",
        lora_r=4,
        lr=1e-2,
        lora_targets="q_proj,gate_proj",
        eval_pairs="heldout",
        sample=1,
    )
    saved = json.loads(Path(report.model, "adapter_config.json").read_text())
    adapted = PeftModel.from_pretrained(load(whole), report.model)  # the tower has layers of these names
    layers = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert layers and all("language_model" in name for name in layers)
    assert "model\\.language_model" in saved["target_modules"]
    merged = train(
        cache, tmp_path / "merged", lora_r=4, lr=1e-2, lora_targets="q_proj,gate_proj", merge_adapter=True
    )
    assert_whole(merged.model, whole)
    completion = next(iter(open_cache(cache).pairs("heldout"))).pair.chosen
    expected = naive_token_logps(adapted, completion)
    assert float((naive_token_logps(load(merged.model), completion) - expected).abs().max()) < 1e-4
    assert float((naive_token_logps(load(whole), completion) - expected).abs().max()) > 1e-2
    # a trained adapter is a reference, too
    rows = write_rows(tmp_path / "again.jsonl", chat_rows(3, seed=9))
    dpo_cache.precompute(report.model, rows, str(tmp_path / "cache"))
    scored = next(iter(open_cache(tmp_path / "cache").pairs("again")))
    own = naive_token_logps(adapted, scored.pair.chosen)
    assert float(own.sum()) == pytest.approx(scored.ref_chosen.logps, abs=1e-3)


def test_a_model_in_memory_keeps_its_towers(cache: str, whole: str, tmp_path: Path) -> None:
    model = load(whole)
    report = dpo_cache.train(
        cache,
        str(tmp_path / "run"),
        pairs="pairs",
        model=model,
        tokenizer=make_tokenizer(),
        batch_size=4,
        log=print,
    )
    assert report.step_zero_gap is not None and report.step_zero_gap < 1e-4
    assert all(parameter.requires_grad for parameter in model.parameters())  # frozen only during the run
    assert_whole(report.model, whole)
