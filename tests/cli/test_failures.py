"""One message for each failure and, with --json, one object on stdout; exit codes are the same."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from dpo_cache.cli import app as app_module
from dpo_cache.cli import train as train_module
from dpo_cache.cli.app import COMMANDS, app
from dpo_cache.cli.failures import UsageError, usage_message
from dpo_cache.cli.signals import Terminated
from dpo_cache.options.base import flag_of
from tests.cli.test_commands import run  # noqa: F401
from tests.cli.test_names import parse
from tests.store.caches import make_cache

FROM_ELSEWHERE = ("train", "eval", "sweep")  # what is needed may come from a file
HELP = "`dpo-cache {} --help` lists the options."
WRONG = {
    "no option": (["train", "c", "--lora", "4"], "no option --lora.\nDid you mean --lora-r?\n"),
    "misspelled": (["train", "c", "--batchsize", "3"], "no option --batchsize.\nDid you mean --batch-size?\n"),
    "letter": (["train", "c", "--seeed", "3"], "no option --seeed.\nDid you mean --seed?\n"),
    "with value": (["train", "c", "--epoch=3"], "no option --epoch.\nDid you mean --epochs?\n"),
    "other library": (["train", "c", "--learning-rate", "3"], "no option --learning-rate.\nDid you mean --lr?\n"),
    "trl": (
        ["train", "c", "--gradient-accumulation-steps", "4"],
        "no option --gradient-accumulation-steps.\nTRL's gradient_accumulation_steps is --batch-size here (",
    ),
    "trl without": (["train", "c", "--padding-free"], "no option --padding-free.\nTRL's padding_free: always: "),
    "unlike": (
        ["train", "c", "--eval-split", "0.1"],
        "no option --eval-split.\nOptions that begin like it: --eval-pairs, --eval-fraction, --eval-every.\n",
    ),
    "nothing like it": (
        ["ls", "c", "--bogus"],
        f"no option --bogus.\nUsage: dpo-cache ls [OPTIONS] {{CACHE}} [NAME]\n{HELP.format('ls')}\n",
    ),
    "a word more": (["precompute", "--model-name", "m"], "no option --model-name.\nDid you mean --model?\n"),
    "of the root": (["--versions"], "no option --versions.\nDid you mean --version?\n"),
    "whole number": (["train", "c", "--batch-size", "x"], "--batch-size x: expected a whole number.\n"),
    "number of sweep": (["sweep", "c", "--jobs", "x"], "--jobs x: expected a whole number.\n"),
    "fraction": (["train", "c", "--batch-size=1.5"], "--batch-size 1.5: expected a whole number.\n"),
    "number": (["gc", "c", "--grace", "day"], "--grace day: expected a number.\n"),
    "old name": (["train", "c", "--epochs", "two"], "--epochs two: expected a number.\n"),
    "missing places": (["diff", "a"], "B is needed.\nUsage: dpo-cache diff [OPTIONS] {A} {B}\n"),
    "missing options": (["precompute"], "CACHE, --model and --dataset are needed.\nUsage: "),
    "command": (["trian", "c"], "no such command 'trian'. Did you mean 'train'?\nUsage: "),
    "too many": (["ls", "a", "b", "c"], "unexpected argument: c.\nUsage: dpo-cache ls "),
    "far too many": (["ls", "a", "b", "c", "d"], "unexpected arguments: c, d.\nUsage: dpo-cache ls "),
    "one letter": (["ls", "a", "-jsn"], "no option -jsn.\nDid you mean --json?\n"),
    "capitals": (["ls", "a", "--JSON"], "no option --JSON.\nDid you mean --json?\n"),
    "before the command": (
        ["--lr", "1", "train"],
        "no option --lr.\nOptions come after the command, as in `dpo-cache COMMAND --lr`.\n",
    ),
    "missing in part": (["export", "c"], "NAME/SPLIT and OUTPUT are needed.\nUsage: dpo-cache export "),
    "missing sources": (["merge", "a"], "SRC... is needed.\nUsage: dpo-cache merge "),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_words_have_one_plain_message(run, case: str) -> None:
    words, message = WRONG[case]
    done = run(*words)
    assert (done.code, done.out) == (2, "") and done.err.startswith(f"error: {message}")
    as_json = run(*words[:1], "--json", *words[1:])
    if words[0] in COMMANDS:
        error = json.loads(as_json.out)["error"]
        assert (as_json.code, error["type"], error["exit_code"]) == (2, "UsageError", 2)
        assert f"error: {error['message']}\n" == as_json.err == done.err


def needed_by(name: str) -> list[str]:
    """What the command calls its required options, in the order of the help."""
    entries = fields(COMMANDS[name].options_class)
    is_optional = name in FROM_ELSEWHERE
    return [
        flag_of(entry) if is_optional else entry.metadata["positional"] or flag_of(entry)
        for entry in entries
        if entry.metadata["required"]
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_everything_that_is_missing_is_in_one_error(run, name: str) -> None:
    done = run(name)
    missing = re.fullmatch(r"error: (.*) (?:is|are) needed\.", done.err.splitlines()[0])
    assert missing and sorted(re.split(", | and ", missing[1])) == sorted(needed_by(name))


def flags_with_a_value() -> list[tuple[str, str]]:
    group = typer.main.get_command(app)
    return [
        (name, flag)
        for name in COMMANDS
        for entry in group.commands[name].params  # type: ignore[attr-defined]
        if entry.param_type_name == "option" and not entry.is_flag and not entry.hidden
        for flag in entry.opts
        if flag != "--resume"  # a value is optional
    ]


def test_an_option_does_not_take_another_one_as_its_value(run) -> None:
    """Every option of every command, in the middle and at the end of the line."""
    found, group = flags_with_a_value(), typer.main.get_command(app)
    assert len(found) > 200 and ("train", "--output") in found and ("sweep", "--lr") in found
    for name, flag in found:
        for words, problem in (
            ([flag, "--json"], f"{flag} needs a value, and --json follows, which looks like an option.\n"
             f"Give a value, or write {flag}=--json if this is the value.\n"),
            (["c", flag, "--", "d"], f"{flag} needs a value.\n"),
            (["c", flag], f"{flag} needs a value.\n"),
        ):  # fmt: skip
            with pytest.raises(UsageError) as error:
                group.commands[name].make_context(name, [*words])  # type: ignore[attr-defined]
            message = usage_message(error.value, [name, *words])
            assert message.startswith(problem) and message.endswith(f"`{name} --help` lists the options.")
    done = run("train", "c", "--output", "--json")
    assert json.loads(done.out)["error"]["message"] == done.err.removeprefix("error: ")[:-1]
    assert parse("train", "c", "--output=--json", "--lr", "-1")["output"] == "--json"


@pytest.mark.parametrize("word", ["--json=1", "--json=", "--json=true"])
@pytest.mark.parametrize("name", COMMANDS)
def test_json_with_a_value_is_a_usage_error_in_json(run, name: str, word: str) -> None:
    done = run(name, "c", word)
    assert done.code == 2 and done.err.startswith("error: option '--json' does not take a value.\n")
    assert json.loads(done.out)["error"]["message"] == done.err.removeprefix("error: ")[:-1]
    assert done.err.endswith(f"`dpo-cache {name} --help` lists the options.\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_without_words_names_what_it_needs(run, name: str) -> None:
    done = run(name)
    assert done.code == 2 and " needed." in done.err and "Traceback" not in done.err
    assert json.loads(run(name, "--json").out)["error"]["message"] == done.err.removeprefix("error: ")[:-1]


def test_help_without_words(run) -> None:
    done = run()
    assert (done.code, done.err) == (2, "") and "Usage: " in done.out


@pytest.mark.parametrize(
    ("words", "kind", "code"),
    [
        (["ls", "{root}/none"], "FormatError", 1),
        (["ls", "{root}/cache", "other"], "NotInCacheError", 1),
        (["train", "{root}/cache", "--output", "{root}/run", "--beta", "-1"], "OptionError", 2),
        (["precompute", "{root}/new", "--model", "{root}/none", "--dataset", "d"], "ModelError", 1),
        (["eval", "{root}/cache", "--model", "{root}/none"], "ModelError", 1),
        (["sweep", "{root}/cache", "--output", "{root}/s", "--beta", "no"], "OptionError", 2),
    ],
)
def test_an_error_is_one_object(run, tmp_path: Path, words: list[str], kind: str, code: int) -> None:
    make_cache(tmp_path / "cache")
    words = [word.format(root=tmp_path) for word in words]
    plain, as_json = run(*words), run(*words, "--json")
    assert plain.out == "" and (plain.code, as_json.code) == (code, code)
    error = json.loads(as_json.out)["error"]
    assert (error["type"], error["exit_code"]) == (kind, code)
    assert plain.err == as_json.err == f"error: {error['message']}\n"


def test_a_command_that_printed_its_report_prints_no_second_object(run, tmp_path: Path) -> None:
    make_cache(tmp_path / "cache")
    shard = next((tmp_path / "cache" / "references").rglob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    done = run("verify", tmp_path / "cache", "--json")
    assert done.code == 1 and json.loads(done.out)["whole"] is False


@pytest.mark.parametrize(
    ("stop", "kind", "code", "word"),
    [(KeyboardInterrupt, "Interrupted", 130, "interrupted"), (Terminated, "Terminated", 143, "terminated")],
)
def test_a_stop_is_no_error_and_says_what_is_kept(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop, kind: str, code: int, word: str
) -> None:  # fmt: skip
    make_cache(tmp_path / "cache")

    def stopped(*_: object) -> None:
        raise stop

    monkeypatch.setattr("dpo_cache.store.upkeep.contents.read_contents", stopped)
    done = run("ls", tmp_path / "cache")
    assert (done.code, done.out, done.err) == (code, "", f"{word}: nothing was changed.\n")
    as_json = run("ls", tmp_path / "cache", "--json")
    assert json.loads(as_json.out)["error"] == {
        "type": kind,
        "message": f"{word}: nothing was changed.",
        "exit_code": code,
    }


def test_an_error_that_no_user_causes_is_an_object_too(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("dpo_cache.store.upkeep.contents.read_contents", broken)
    monkeypatch.setattr("sys.argv", ["dpo-cache", "ls", str(tmp_path), "--json"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="a bug"):
        app_module.main()
    signal.signal(signal.SIGTERM, before)
    error = {"type": "RuntimeError", "message": "a bug", "exit_code": 1}
    assert json.loads(capsys.readouterr().out) == {"error": error}


def test_a_run_without_a_checkpoint_says_how_to_get_one() -> None:
    assert "Next: the same command" in train_module._stopped_at_once("run", [])
