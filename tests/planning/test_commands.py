"""The commands of a plan parse, with the options that were given."""

import shlex
from typing import Any

import pytest
import typer

from dpo_cache.cli.app import app
from dpo_cache.options.plan import PlanOptions
from dpo_cache.planning.commands import precompute_command, train_command


def parsed(line: str) -> dict[str, Any]:
    program, command, *words = shlex.split(line)
    assert program == "dpo-cache"
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    return found.make_context(command, words).params


def test_only_options_that_differ_from_their_defaults() -> None:
    options = PlanOptions(model="m")
    assert precompute_command(options) == "dpo-cache precompute --model m --dataset DATA --cache CACHE"
    assert train_command(options) == "dpo-cache train --model m --cache CACHE --output RUN"


def test_given_and_chosen_options() -> None:
    options = PlanOptions(
        model="a b", cache="c", pairs="p", batch_size=8, optimizer="adafactor", max_grad_norm=0.0, lora_r=4
    )
    found = parsed(train_command(options, memory="small", budget_tokens=1024, quantize="4bit"))
    expected = {
        "model": "a b", "cache": "c", "pairs": "p", "batch_size": 8, "optimizer": "adafactor", "lora_r": 4,
        "max_grad_norm": 0.0, "memory": "small", "budget_tokens": "1024", "quantize": "4bit",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_options_of_the_data() -> None:
    options = PlanOptions(
        model="m", dataset="d.jsonl", split=("a", "b"), map=("prompt=q",), max_length=512, limit=3,
        trust_remote_code=True, lora_r=4, batch_size=2,
    )  # fmt: skip
    found = parsed(precompute_command(options, stream_weights="on"))
    expected = {
        "dataset": "d.jsonl", "split": ["a", "b"], "map": ["prompt=q"], "max_length": 512, "limit": 3,
        "trust_remote_code": True, "stream_weights": "on",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert "--lora-r" not in precompute_command(options) and "--limit" not in train_command(options)


@pytest.mark.parametrize("make", [precompute_command, train_command])
def test_nothing_is_lost_that_both_commands_take(make: Any) -> None:
    options = PlanOptions(model="m", trust_remote_code=True, budget_tokens="512", quantize="4bit")
    line = make(options, quantize="4bit")
    assert "--trust-remote-code" in line and "--quantize 4bit" in line and "--budget-tokens 512" in line
