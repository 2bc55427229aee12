"""Values of options, refused combinations, and the names of runs."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from dpo_cache.cli.app import app
from dpo_cache.errors import OptionError
from dpo_cache.options.sweep import NOT_IN_A_SWEEP, SweepOptions, loss_settings, swept_fields, type_of
from dpo_cache.options.train import TrainOptions
from dpo_cache.sweeping.grid import Grid, read_grid, run_names
from dpo_cache.sweeping.processes import train_arguments
from dpo_cache.sweeping.sweep_folder import Run


def grid_of(**options: Any) -> Grid:
    return read_grid(SweepOptions(cache="cache", output="out", **options))


def test_every_option_of_train_is_one_of_the_sweep() -> None:
    own = {"jobs", "plot", "resume"}
    names = {entry.name for entry in fields(SweepOptions)}
    assert names - own == {entry.name for entry in fields(TrainOptions)} - set(NOT_IN_A_SWEEP)


def test_the_objective_is_the_part_of_the_help_called_loss() -> None:
    assert {"loss", "beta", "label_smoothing", "wpo", "reference_free"} <= loss_settings()
    assert not {"lr", "epochs", "seed", "model", "pairs", "budget_tokens"} & loss_settings()


VALUES = [
    ("beta", "0.05, 0.1", (0.05, 0.1)),
    ("beta", (0.05, 1), (0.05, 1.0)),
    ("beta", ("0.05,0.1", "0.3"), (0.05, 0.1, 0.3)),
    ("seed", "1,2,3", (1, 2, 3)),
    ("shuffle", (True, False), (True, False)),
    ("ld_alpha", "none,0.5", (None, 0.5)),
    ("ld_alpha", [None, 0.5], (None, 0.5)),
    ("gradient_checkpointing", "none,full", ("none", "full")),
    ("loss", "sigmoid,ipo", (("sigmoid",), ("ipo",))),
    ("loss", "sigmoid:0.8+sft:0.2,ipo", (("sigmoid:0.8", "sft:0.2"), ("ipo",))),
    ("loss", [("sigmoid:0.8", "sft:0.2"), "ipo"], (("sigmoid:0.8", "sft:0.2"), ("ipo",))),
    ("pairs", r"a\,b,c", ("a,b", "c")),
    ("pairs", r"a\b,c", (r"a\b", "c")),
    ("model", [Path("models/a b"), "c"], ("models/a b", "c")),
    ("budget_tokens", ["auto", 512], ("auto", "512")),
]


@pytest.mark.parametrize(("name", "given", "values"), VALUES)
def test_values(name: str, given: Any, values: tuple[Any, ...]) -> None:
    grid = grid_of(**{name: given})
    assert grid.values(name) == values
    assert [type(value) for value in grid.values(name)] == [type(value) for value in values]
    assert list(grid.varied) == [name]


WRONG = [
    ({"beta": "0.1,abc"}, "`beta` abc: expected a number."),
    ({"seed": "1,1.5"}, "`seed` 1.5: expected a whole number."),
    ({"seed": [1, 1.5]}, "`seed` 1.5: expected a whole number."),
    ({"seed": [True, 2]}, "`seed` True: expected a whole number."),
    ({"beta": "0.1,0.10"}, "`beta` 0.1: given 2 times.\nGive each value once."),
    ({"beta": "0.1,"}, "`beta`: one of its values is empty.\nSeparate values with one comma each."),
    ({"beta": "none"}, "`beta` none: expected a number."),
    ({"shuffle": "yes"}, "`shuffle` yes: expected True or False."),
    ({"wpo": "on,full"}, "1 of 2 combinations make no sense"),
    ({"jobs": 0}, "`jobs` 0: expected a whole number above 0."),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        grid_of(**options)
    assert str(caught.value).startswith(message)


def test_the_grid_is_the_product_in_a_stable_order() -> None:
    grid = grid_of(loss="sigmoid,ipo", beta="0.05,0.1", lr=1e-4)
    assert grid.shared["lr"] == 1e-4 and grid.shared["batch_size"] == 32
    assert grid.combinations() == [
        {"beta": 0.05, "loss": ("sigmoid",)},
        {"beta": 0.05, "loss": ("ipo",)},
        {"beta": 0.1, "loss": ("sigmoid",)},
        {"beta": 0.1, "loss": ("ipo",)},
    ]
    assert run_names(grid.combinations())[:2] == ["beta=0.05,loss=sigmoid", "beta=0.05,loss=ipo"]
    assert run_names(grid_of(beta=0.1).combinations()) == ["run"]


def test_all_combinations_that_make_no_sense_are_named_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        grid_of(label_smoothing="0,0.1", loss="sigmoid,ipo,exo_pair")
    assert str(caught.value) == (
        "2 of 6 combinations make no sense, so nothing was run:\n"
        "  label_smoothing=0.0, loss=exo_pair: `loss` exo_pair needs a `label_smoothing` above 0; its "
        "paper takes 0.001.\n"
        "  label_smoothing=0.1, loss=ipo: `label_smoothing` 0.1 has no meaning under `loss` ipo. "
        "Leave it out; it is used by sigmoid, exo_pair, robust, aot, aot_unpaired, simpo, cpo.\n"
        "Leave such values out, or run them as another sweep."
    )


def test_one_error_for_all_combinations_is_that_of_train() -> None:
    with pytest.raises(OptionError) as caught:
        grid_of(lr=-1, loss="sigmoid,ipo")
    assert str(caught.value) == "`lr` -1.0: expected a number above 0."


def test_names_differ() -> None:
    names = run_names([{"model": "a/b"}, {"model": "a-b"}, {"model": "A-B"}, {"model": "c" * 300}])
    assert len({name.lower() for name in names}) == 4
    assert [
        name.startswith(start)
        for name, start in zip(names, ("model=a-b-", "model=a-b-", "model=A-B-", "model=ccc"), strict=True)
    ] == [True] * 4
    assert run_names([{"loss": ("sigmoid:0.8", "sft:0.2")}, {"loss": ("ipo",)}]) == [
        "loss=sigmoid-0.8+sft-0.2",
        "loss=ipo",
    ]


@given(st.lists(st.text(min_size=1, max_size=300), min_size=2, max_size=6, unique=True))
def test_names_are_those_of_folders(texts: list[str]) -> None:
    names = run_names([{"model": text} for text in texts])
    assert len({name.lower() for name in names}) == len(texts)
    for name in names:
        assert (
            len(name.encode()) < 200
            and Path(name).name == name
            and name not in (".", "..", "logs")
            and "\0" not in name
        )


ODD = {
    "model": "models/a b",
    "pairs": "-x,y",
    "loss": ("sigmoid:0.8", "sft:0.2"),
    "beta": 1e-7,
    "shuffle": False,
    "trust_remote_code": True,
    "max_steps": 3,
    "eval_pairs": "held 'out'",
    "budget_tokens": "512",
}


def test_a_run_is_given_every_option_through_the_command_line() -> None:
    shared = {
        entry.name: ODD.get(entry.name, getattr(TrainOptions(cache="c", output="o"), entry.name))
        for entry in swept_fields()
    }
    arguments = train_arguments(
        "some cache", Run("run", Path("out/run"), Path("out/logs/run.log"), shared, {})
    )
    assert "--no-shuffle" in arguments and "--resume" not in arguments
    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    read = command.make_context("train", arguments[1:]).params
    for entry in swept_fields():
        found = tuple(read[entry.name]) if type_of(entry) is tuple else read[entry.name]
        assert found == shared[entry.name], entry.name
    assert read["cache"] == "some cache" and read["output"] == "out/run" and read["as_json"] is True
