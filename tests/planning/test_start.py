"""Checks before a start; the commands are in `tests/cli/test_startup.py`."""

import importlib.util
from pathlib import Path

import pytest

from dpo_cache.options.train import TrainOptions
from dpo_cache.planning.start import TRAIN_INPUTS, check_train
from tests.store.caches import make_cache


class Recording:
    """Options that remember which of them were read."""

    def __init__(self, options: TrainOptions):
        self._options, self.read = options, set[str]()

    def __getattr__(self, name: str) -> object:
        self.read.add(name)
        return getattr(self._options, name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantize": "4bit", "lora_r": 2, "optimizer": "adamw-8bit"},
        {"peft_config": "adapter.json", "chat_template": "file.jinja"},
        {"eval_pairs": "demo", "reference": ""},
    ],
)
def test_the_inputs_of_a_run_are_all_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: importlib.machinery.ModuleSpec(name, None, origin=name)
    )
    monkeypatch.chdir(tmp_path)
    make_cache(tmp_path / "cache")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "adapter.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "file.jinja").write_text("")
    given = {name: value or None for name, value in options.items()}
    asked = Recording(TrainOptions(cache="cache", output="run", model="model", pairs="demo", **given))
    check_train(asked)  # type: ignore[arg-type]
    assert asked.read <= set(TRAIN_INPUTS), asked.read - set(TRAIN_INPUTS)
