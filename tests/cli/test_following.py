"""The commands that are suggested after pairs were stored."""

from pathlib import Path

import pytest

from dpo_cache.cli.following import is_for_evaluation, suggest
from tests.cli.test_commands import run  # noqa: F401  (a fixture)
from tests.conftest import chat_rows, write_rows


@pytest.mark.parametrize(
    "name", ["heldout/train", "demo-heldout/train", "held_out/x", "prefs/test", "prefs/test_prefs", "val2/train", "evalSet/a", "TEST/x"]
)  # fmt: skip
def test_pairs_for_evaluation_are_known_by_their_names(name: str) -> None:
    assert is_for_evaluation(name)


@pytest.mark.parametrize(
    "name", ["pairs/train", "latest/train", "contest/train", "valley/train", "devices/all"]
)
def test_other_names_are_of_pairs_to_train_on(name: str) -> None:
    assert not is_for_evaluation(name)


def train(pairs: str, *more: str) -> str:
    return " ".join(["dpo-cache train --cache c --pairs", pairs, "--output RUN", *more])


@pytest.mark.parametrize(
    ("names", "known", "lines"),
    [
        (["a/train"], {"a/train": "r"}, [train("a/train")]),
        (["a/train"], {"a/train": "r", "heldout/train": "r"}, [train("a/train", "--eval-pairs heldout/train")]),
        (["a/train"], {"a/train": "r", "heldout/train": "other"}, [train("a/train")]),
        (["a/train"], {"a/train": "r", "a/test": "r", "b/test": "r"}, [train("a/train")]),
        (["a/train", "a/test"], {"a/train": "r", "a/test": "r"}, [train("a/train", "--eval-pairs a/test")]),
        (["heldout/train"], {"a/train": "r", "heldout/train": "r"}, [train("a/train", "--eval-pairs heldout/train")]),
        (["heldout/train"], {"heldout/train": "r"}, ["dpo-cache eval --cache c --pairs heldout/train --model MODEL"]),
        (["heldout/train"], {"heldout/train": "r", "a/train": "other"},
            ["dpo-cache eval --cache c --pairs heldout/train --model MODEL"]),
    ],
)  # fmt: skip
def test_pairs_for_evaluation_are_never_suggested_to_train_on(
    names: list[str], known: dict[str, str], lines: list[str]
) -> None:
    assert suggest("c", names, known) == lines


def test_commands_suggest_the_pairs_that_belong_together(run, model_folder: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = []
    for name, rows in (("heldout", chat_rows(4, seed=9)), ("pairs", chat_rows(6))):
        data = write_rows(tmp_path / f"{name}.jsonl", rows)
        done = run("precompute", "--model", model_folder, "--dataset", data, "--cache", cache)
        found.append(done.out.splitlines()[-1].strip())
    both = f"dpo-cache train --cache {cache} --pairs pairs/train --output RUN --eval-pairs heldout/train"
    assert found == [f"dpo-cache eval --cache {cache} --pairs heldout/train --model MODEL", both]
    assert run("ls", cache).out.splitlines()[-1].endswith(f"Next: {both}")
