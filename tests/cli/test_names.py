"""One name for one idea in every command, and earlier names that still work."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

import dpo_cache
from dpo_cache.cli.app import COMMANDS, app
from dpo_cache.cli.output import option_names, output_of_one_command, with_flags
from dpo_cache.errors import OptionError
from dpo_cache.options.base import flag_of, old_names, with_new_names
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.options.sweep import SweepOptions
from tests.cli.test_commands import run  # noqa: F401  (a fixture)
from tests.conftest import chat_rows, write_rows
from tests.store.caches import make_cache

ONE_NAME = {"micro_tokens", "expect_reference", "replace", "out"}
OLD = [
    (command, old, new)
    for command, invoke in COMMANDS.items()
    for old, new in old_names(invoke.options_class).items()
]
NEEDED = {
    "plan": ["--model", "m"],
    "precompute": ["--model", "m", "--dataset", "d"],
    "eval": ["--model", "m"],
    "rm": ["pairs", "n"],
    "import": ["--dataset", "d", "--reference", "r"],
    "export": ["--pairs", "p", "--output", "o"],
    "pull": ["s3://b/c", "here"],
    "push": ["here", "s3://b/c"],
}


def parse(command: str, *words: str) -> dict[str, Any]:
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    return found.make_context(command, list(words)).params


def with_cache() -> list[str]:
    return [
        name
        for name, invoke in COMMANDS.items()
        if any(entry.name == "cache" for entry in fields(invoke.options_class))
    ]


@pytest.mark.parametrize("command", with_cache())
def test_the_cache_is_given_by_place_or_by_flag(command: str) -> None:
    needed = NEEDED.get(command, [])
    expected = parse(command, "place", *needed)
    assert expected["cache"] == "place"
    assert parse(command, "--cache", "place", *needed) == expected
    assert parse(command, *needed, "--cache=place") == expected
    assert parse(command, *needed, "place") == expected or command == "rm"


def test_places_that_are_left_are_those_of_the_other_arguments() -> None:
    by_place = parse("export", "cache", "demo", "out.jsonl")
    assert parse("export", "--cache", "cache", "demo", "out.jsonl") == by_place
    assert parse("export", "cache", "--pairs", "demo", "out.jsonl") == by_place
    assert parse("export", "cache", "demo", "--output", "out.jsonl") == by_place
    assert parse("ls", "demo", "--cache", "cache") == parse("ls", "cache", "demo")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in with_cache()])
def test_every_other_command_works_on_two_caches(command: str) -> None:
    assert command in ("merge", "diff", "pull", "push")


def flags_of(command: str) -> set[str]:
    """All flags that the command takes."""
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    return {flag for entry in parameters for flag in (*entry.opts, *entry.secondary_opts)}


@pytest.mark.parametrize("command", COMMANDS)
def test_messages_name_only_options_that_the_command_has(command: str) -> None:
    """Whatever option a message of the library names, in any command."""
    names = sorted(option_names())
    assert {"cache", "kind", "max_length", "with_pairs"} <= {*names}
    with output_of_one_command(COMMANDS[command].options_class):
        shown = {name: with_flags(f"Give `{name}`.") for name in names}
        off = with_flags("Leave out `text=False`.")
    own = {entry.name: entry for entry in fields(COMMANDS[command].options_class)}
    for name, text in shown.items():
        flags = re.findall(r"--[a-z-]+", text)
        assert {*flags} <= flags_of(command), text
        if name not in own:
            assert text == f"Give {name.replace('_', ' ')}."
        elif not flags:
            assert text == f"Give {own[name].metadata['positional']}."
    assert off == ("Leave out --no-text." if command == "export" else "Leave out text.")


def test_an_idea_has_no_second_name() -> None:
    names = {entry.name for invoke in COMMANDS.values() for entry in fields(invoke.options_class)}
    assert not names & ONE_NAME and {old for _, old, _ in OLD} == ONE_NAME


@pytest.mark.parametrize(("command", "old", "new"), OLD)
def test_an_earlier_flag_works_with_a_remark(
    command: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = next(entry for entry in fields(COMMANDS[command].options_class) if entry.name == new)
    old_flag, value = "--" + old.replace("_", "-"), [] if entry.type == "bool" else ["7"]
    needed = [
        word for word in NEEDED.get(command, []) if command != "export" or word not in ("--output", "o")
    ]
    needed += [] if command in ("pull", "push") else ["--cache", "c"]
    expected = parse(command, *needed, flag_of(entry), *value)
    assert capsys.readouterr().err == ""
    assert parse(command, *needed, old_flag, *value) == expected
    assert capsys.readouterr().err == f"{old_flag} is now {flag_of(entry)}.\n"
    assert expected[new] in (True, "7", ["7"])


def test_an_earlier_flag_is_not_in_the_help(run) -> None:
    for command, old, _ in OLD:
        assert "--" + old.replace("_", "-") not in run(command, "--help").out.split()


def test_an_earlier_keyword_works_with_a_remark(model_folder: str, data_file: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    report = dpo_cache.precompute(model_folder, data_file, cache)
    again = dpo_cache.precompute(model_folder, data_file, cache, expect_reference=report.reference[:9])
    assert "expect_reference is now reference." in again.remarks
    trained = dpo_cache.train(cache, tmp_path / "run", micro_tokens=64, max_steps=1)
    assert "micro_tokens is now budget_tokens." in trained.remarks
    assert trained.resolved["budget_tokens"] == 64
    exported = dpo_cache.export_pairs(cache, "pairs", out=tmp_path / "out.jsonl")
    assert exported.remarks[0] == "out is now output." and (tmp_path / "out.jsonl").exists()
    assert with_new_names(SweepOptions, {"micro_tokens": [1, 2]}) == {"budget_tokens": [1, 2]}


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(OptionError, match=r"^expect_reference is now reference: give one of them\.$"):
        with_new_names(PrecomputeOptions, {"reference": "a", "expect_reference": "a"})


def rename_in_file(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert f'"{new}"' in text
    path.write_text(text.replace(f'"{new}"', f'"{old}"'))


@pytest.fixture
def cache(model_folder: str, tmp_path: Path) -> Path:
    data = write_rows(tmp_path / "pairs.jsonl", chat_rows(12))
    dpo_cache.precompute(model_folder, data, tmp_path / "cache")
    return tmp_path / "cache"


def stopped_run(cache: Path, output: Path, **options: Any) -> None:
    """A run that is stopped after its first step, with a config.json of an earlier version."""
    stopped = dpo_cache.train(
        cache, output, batch_size=4, lr=1e-3, budget_tokens=64, should_stop=lambda: True, **options
    )
    assert not stopped.finished
    rename_in_file(output / "config.json", "micro_tokens", "budget_tokens")


def test_a_run_is_resumed_by_only_its_folder(run, cache: Path, tmp_path: Path) -> None:
    output, whole = tmp_path / "run", tmp_path / "whole"
    stopped_run(cache, output, beta=0.3, seed=5)
    done = run("train", "--resume", output)
    assert done.code == 0 and "is now" not in done.err, done.err
    dpo_cache.train(cache, whole, batch_size=4, lr=1e-3, budget_tokens=64, beta=0.3, seed=5)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (output, whole)]
    assert weights[0] == weights[1]


def test_options_next_to_resume_override_what_may_change(run, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    stopped_run(cache, output)
    refused = run("train", "--resume", output, "--beta", 0.7)
    assert (refused.code, refused.err) == (
        1,
        "error: this run was started with other options:\n  beta: 0.1 before, 0.7 now\n"
        "Give the same options, or choose another --output.\n",
    )
    elsewhere = cache.rename(tmp_path / "moved")
    assert run("train", "--resume", output).code == 1
    done = run("train", f"--resume={output}", "--cache", elsewhere, "--budget-tokens", 512)
    assert done.code == 0, done.err


def test_resume_stays_a_switch(run, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    stopped_run(cache, output)
    options = ("--batch-size", 4, "--lr", 1e-3, "--micro-tokens", 64)
    done = run("train", "--cache", cache, "--output", output, *options, "--resume")
    assert done.code == 0 and done.err.startswith("--micro-tokens is now --budget-tokens.\n"), done.err


def test_train_resumes_from_python(cache: Path, tmp_path: Path) -> None:
    stopped_run(cache, tmp_path / "run")
    assert dpo_cache.train(resume=tmp_path / "run").finished
    with pytest.raises(OptionError, match="a run is resumed in its own folder"):
        dpo_cache.train(resume=tmp_path / "run", output=tmp_path / "other")
    with pytest.raises(OptionError, match="Leave `config` out"):
        dpo_cache.train(resume=tmp_path / "run", config=tmp_path / "run" / "config.json")


def test_a_config_of_an_earlier_version_is_read(run, cache: Path, tmp_path: Path) -> None:
    stopped_run(cache, tmp_path / "run")
    done = run("train", "--config", tmp_path / "run" / "config.json", "--output", tmp_path / "next")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "next" / "config.json").read_text())["budget_tokens"] == "64"


def test_copies_take_either_name(run, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache")
    done = run("push", tmp_path / "cache", f"file://{tmp_path}/target", "--replace")
    assert done.err.startswith("--replace is now --overwrite.\n")


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_resume_takes_a_folder_or_none(command: str) -> None:
    assert parse(command, "--resume", "folder", "--beta", "1")["resume"] == "folder"
    assert parse(command, "--resume", "--json")["resume"] == ""
    assert parse(command, "--json")["resume"] is None


@pytest.mark.parametrize(
    ("words", "old", "new"),
    [
        (["train", "c", "--output", "o", "--budget-tokens", 500, "--micro-tokens", 60],
         "--micro-tokens", "--budget-tokens"),
        (["train", "c", "--output", "o", "--micro-tokens=60", "--budget-tokens=500"],
         "--micro-tokens", "--budget-tokens"),
        (["sweep", "c", "--output", "o", "--micro-tokens", "60,70", "--budget-tokens", 500],
         "--micro-tokens", "--budget-tokens"),
        (["precompute", "--model", "m", "--dataset", "d", "--cache", "c", "--reference", "a",
          "--expect-reference", "b"], "--expect-reference", "--reference"),
        (["export", "c", "p", "--output", "o.jsonl", "--out", "p.jsonl"], "--out", "--output"),
        (["push", "c", "d", "--replace", "--overwrite"], "--replace", "--overwrite"),
    ],
)  # fmt: skip
def test_both_flags_of_an_option_are_refused(run, words: list, old: str, new: str) -> None:
    done = run(*words)
    assert (done.code, done.err) == (2, f"error: {old} is now {new}: give one of them.\n")
