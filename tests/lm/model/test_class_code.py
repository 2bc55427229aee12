"""Classes of the caller's share an id only where their files, and what no file shows, are the same."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.class_code import class_code_digest, code_files
from tests.conftest import make_llama

MINE = """
import logging
from transformers import LlamaForCausalLM
import own_helper
from own_package.deep import DEPTH

logger = logging.getLogger(__name__)
FACTOR = 1.0

def scaled(hidden):
    return hidden * FACTOR

def make(scale):
    class Closed(LlamaForCausalLM):
        def forward(self, *given, **options):
            found = super().forward(*given, **options)
            found.logits = scaled(found.logits) * scale
            return found
    return Closed

class Plain(LlamaForCausalLM):
    factor = 1.0
    def forward(self, *given, by=1.0, **options):
        logger.debug("forward")
        return super().forward(*given, **options)
    def later(self):
        import own_later
        return own_later.X
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user's, and a function that writes and imports it again."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_package").mkdir()
    files = {
        "own_mine.py": MINE,
        "own_helper.py": "SCALE = 1.0\n",
        "own_later.py": "X = 1\n",
        "own_package/__init__.py": "",
        "own_package/deep.py": "from . import base\nDEPTH = 1\n",
        "own_package/base.py": "BASE = 1\n",
    }

    def load(**changed: str) -> Any:
        for name in [name for name in sys.modules if name.startswith("own_")]:
            monkeypatch.delitem(sys.modules, name)
        for name, text in {**files, **{f"{key}.py": text for key, text in changed.items()}}.items():
            (tmp_path / name).write_text(text)
        for cached in tmp_path.rglob("*.pyc"):
            cached.unlink()
        return __import__("own_mine")

    return load


def test_the_digest_is_that_of_the_same_code_read_again(mine: Callable[..., Any]) -> None:
    one = mine()
    first = [class_code_digest({one.Plain}), class_code_digest({one.make(2.0)})]
    other = mine()
    assert first == [class_code_digest({other.Plain}), class_code_digest({other.make(2.0)})]
    assert class_code_digest({type(make_llama())}) is None


def test_what_a_method_closes_over_counts(mine: Callable[..., Any]) -> None:
    module = mine()
    assert class_code_digest({module.make(1.0)}) != class_code_digest({module.make(2.0)})
    assert class_code_digest({module.make(len)}) != class_code_digest({module.make(module.scaled)})


def test_class_attributes_defaults_and_values_of_the_module_count(mine: Callable[..., Any]) -> None:
    module = mine()
    found = [class_code_digest({module.Plain}), class_code_digest({module.make(1.0)})]
    module.Plain.factor = 2.0
    found.append(class_code_digest({module.Plain}))
    module.Plain.forward.__kwdefaults__["by"] = 3.0
    found.append(class_code_digest({module.Plain}))
    module.FACTOR = 2.0
    found.append(class_code_digest({module.make(1.0)}))
    assert len(set(found)) == 5


@pytest.mark.parametrize(
    "changed",
    [
        {"own_helper": "SCALE = 2.0\n"},
        {"own_later": "X = 2\n"},
        {"own_package/deep": "DEPTH = 2\n"},
        {"own_package/base": "BASE = 2\n"},
        {"own_package/__init__": "# other\n"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_files_that_are_imported_by_their_full_names_count(
    mine: Callable[..., Any], changed: dict[str, str]
) -> None:
    before = class_code_digest({mine().Plain})
    assert class_code_digest({mine(**changed).Plain}) != before


def test_installed_packages_are_not_followed(mine: Callable[..., Any]) -> None:
    mine()
    assert set(code_files("own_mine")) == {
        "own_mine",
        "own_helper",
        "own_later",
        "own_package",
        "own_package.deep",
        "own_package.base",
    }


def test_what_cannot_be_described_is_refused(mine: Callable[..., Any]) -> None:
    class Strange:
        pass

    with pytest.raises(
        ModelError, match=r"holds a tests\..*Strange, and a model whose code does so cannot be"
    ):
        class_code_digest({mine().make(Strange())})
