"""Importing peft."""

import logging
import sys
from pathlib import Path

import pytest

from dpo_cache.errors import OptionError
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from tests.conftest import make_llama


@pytest.fixture
def without_peft(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in sys.modules if name == "peft" or name.startswith("peft.")]:
        monkeypatch.delitem(sys.modules, name)
    return monkeypatch


def test_a_missing_peft_is_named(without_peft: pytest.MonkeyPatch) -> None:
    class NoPeft:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "peft":
                raise ModuleNotFoundError("No module named 'peft'", name="peft")

    without_peft.setattr(sys, "meta_path", [NoPeft(), *sys.meta_path])
    with pytest.raises(OptionError, match=r"^adapters need the package peft\.\nRun `pip install peft`\.$"):
        lora_config(4, None, "all-linear")


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("from transformers import HybridCache", "cannot import name 'HybridCache' from 'transformers'"),
        ("import not_there", "No module named 'not_there'"),
    ],
)
def test_a_peft_that_cannot_be_imported_shows_the_cause(
    without_peft: pytest.MonkeyPatch, tmp_path: Path, code: str, cause: str
) -> None:
    (tmp_path / "peft.py").write_text(code)
    without_peft.syspath_prepend(tmp_path)
    with pytest.raises(OptionError) as caught:
        lora_config(4, None, "all-linear")
    problem, advice = str(caught.value).split("\n")
    assert problem.startswith(f"peft is installed, but importing it failed: {cause}")
    assert advice == "Run `pip install --upgrade peft accelerate transformers`, so that their versions fit."


def test_a_warning_of_bitsandbytes_is_left_out_while_peft_imports_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import peft

    logger, adapt = logging.getLogger("bitsandbytes.backends"), peft.get_peft_model

    def warn(*given: object) -> object:
        logger.warning("no kernels for this CPU")
        return adapt(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(peft, "get_peft_model", warn)
    add_adapter(make_llama(), lora_config(4, None, "all-linear"), seed=0)
    assert "no kernels" not in caplog.text
    logger.warning("later")
    assert "later" in caplog.text
