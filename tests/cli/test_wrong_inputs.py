"""Every command with wrong paths: one message in plain words, before anything is written or a model is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dpo_cache.cli.app import COMMANDS
from tests.cli.test_commands import run  # noqa: F401
from tests.cli.test_names import flags_of
from tests.conftest import chat_rows, write_rows
from tests.store.caches import make_cache

PRECOMPUTE = "precompute {root}/new --model {root}/model --dataset {root}/pairs.jsonl"
IMPORT = "import {root}/new {root}/pairs.jsonl --reference r --tokenizer {root}/model"
# {x} is a folder that does not exist, a file, an empty folder, and a folder of other things
READ = [
    "plan --model {x}",
    "plan --model {root}/model --cache {x}",
    "plan --model {root}/model --dataset {x}",
    "precompute {root}/new --model {x} --dataset {root}/pairs.jsonl",
    "precompute {root}/new --model {root}/model --dataset {x}",
    f"{PRECOMPUTE} --tokenizer {{x}}",
    "train {x} --output {root}/run",
    "train {root}/cache --output {root}/run --model {x}",
    "train {root}/cache --output {root}/run --config {x}",
    "train {root}/cache --output {root}/run --trl-config {x}",
    "train {root}/cache --output {root}/run --peft-config {x} --model {root}/model",
    "train --resume {x}",
    "eval {x} --model {root}/model",
    "eval {root}/cache --model {x}",
    "eval {root}/cache --run {x}",
    "sweep {x} --output {root}/sweep",
    "sweep {root}/cache --output {root}/sweep --model {x}",
    "sweep --resume {x}",
    "ls {x}",
    "ls {root}/cache {x}",
    "verify {x}",
    "verify {root}/cache --rescore 1 --model {x}",
    "compact {x}",
    "gc {x}",
    "rm {x} pairs p",
    "rm {root}/cache pairs {x}",
    "rm {root}/cache {x} p",
    "diff {x} {root}/cache",
    "diff {root}/cache {x}",
    "merge {x} {root}/new",
    "push {x} file://{root}/new",
    "push {root}/cache {x}",
    "pull file://{x} {root}/new",
    "pull {x} {root}/new",
    "export {x} p {root}/out.jsonl",
    "export {root}/cache {x} {root}/out.jsonl",
    "import {root}/new {x} --reference r --tokenizer {root}/model",
]
# {x} is a file, and a folder of other things
WRITTEN = [
    "precompute {x} --model {root}/model --dataset {root}/pairs.jsonl",
    "train {root}/cache --output {x} --model {root}/model",
    "sweep {root}/cache --output {x} --model {root}/model",
    "merge {root}/cache {x}",
    "push {root}/cache file://{x}",
    "pull file://{root}/cache {x}",
    "export {root}/cache demo {x}",
    "import {x} {root}/pairs.jsonl --reference r --tokenizer {root}/model",
]
CASES = [(kind, line) for kind in ("none", "file", "empty", "other") for line in READ]
CASES += [(kind, line) for kind in ("file", "other") for line in WRITTEN]
PYTHON = re.compile(r"Traceback|Errno|<class|NoneType|Input should be|\(none\)")
OTHER_COMMAND = re.compile(r"`dpo-cache [^`]*`|dpo-cache [a-z]+ --\S+ \S+")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    make_cache(folder / "cache")
    write_rows(folder / "pairs.jsonl", chat_rows(6))
    (folder / "model").symlink_to(model_folder)
    (folder / "file").write_text("hello\n")
    (folder / "empty").mkdir()
    (folder / "other").mkdir()
    (folder / "other" / "notes").write_text("mine")
    return folder


def content_of(root: Path) -> set[Path]:
    return {*root.rglob("*")}


def test_every_command_is_tried() -> None:
    assert {line.split()[0] for line in READ} == {*COMMANDS}


@pytest.mark.parametrize(("kind", "line"), CASES)
def test_a_wrong_path_is_one_plain_message(run, root: Path, kind: str, line: str) -> None:
    words = line.format(root=root, x=root / kind).split()
    before = content_of(root)
    done = run(*words, "--json")
    error = json.loads(done.out)["error"]
    assert done.code == error["exit_code"] and done.code in (1, 2)
    assert done.err.endswith(f"error: {error['message']}\n") and done.err.count("error: ") == 1
    assert kind in done.err and not PYTHON.search(done.err), done.err
    named = re.findall(r"(?<![\w-])--[a-z][a-z-]+", OTHER_COMMAND.sub("", error["message"]))
    assert {*named} <= flags_of(words[0]), done.err
    assert content_of(root) == before
