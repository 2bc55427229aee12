"""The table of losses agrees with its functions, and a new loss needs only an entry and a function."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import dpo_cache
from dpo_cache.errors import OptionError
from dpo_cache.losses import policy_losses, reference_losses
from dpo_cache.losses.entry import INPUTS, Limit, Loss
from dpo_cache.losses.objective import loss_function
from dpo_cache.losses.table import DPO, LOSSES
from dpo_cache.losses.terms import SETTINGS, is_served, losses_served_by
from dpo_cache.options.sweep import SweepOptions
from dpo_cache.sweeping.grid import read_grid
from tests.conftest import chat_rows, write_rows
from tests.losses.write_table import PAGE, losses_table, with_tables

MARGIN_LOSSES = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "ipo_norm", "exo_pair", "robust", "discopop"]
RATIO_LOSSES = ["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"]
SORTED_LOSSES = ["aot", "aot_unpaired"]
POLICY_LOSSES = ["simpo", "orpo", "cpo", "slic"]
SERVED = {
    "beta": [*MARGIN_LOSSES, *RATIO_LOSSES, *SORTED_LOSSES, *POLICY_LOSSES],
    "label_smoothing": ["sigmoid", "exo_pair", "robust", *SORTED_LOSSES, "simpo", "cpo"],
    "discopop_tau": ["discopop"],
    "simpo_gamma": ["simpo"],
    "cpo_alpha": ["cpo"],
    "reference_free": MARGIN_LOSSES,
    "f_divergence": MARGIN_LOSSES,
    "f_alpha": MARGIN_LOSSES,
    "ld_alpha": [*MARGIN_LOSSES, *RATIO_LOSSES, *SORTED_LOSSES],
    "ld_reference": [*MARGIN_LOSSES, *RATIO_LOSSES, *SORTED_LOSSES],
    "wpo": [*MARGIN_LOSSES, *RATIO_LOSSES],
}


def functions() -> dict[str, Callable[..., torch.Tensor]]:
    """Every function `NAME_losses` of the two files, by its name."""
    return {
        name: function
        for module in (reference_losses, policy_losses)
        for name, function in vars(module).items()
        if name.endswith("_losses") and getattr(function, "__module__", "") == module.__name__
    }


def test_every_function_is_in_the_table_and_every_entry_has_one() -> None:
    assert functions().keys() == {loss.function for loss in LOSSES.values()}
    assert all(name == loss.name for name, loss in LOSSES.items())


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_parameters_are_the_inputs_and_settings_of_the_entry(loss: Loss) -> None:
    function = loss_function(loss)
    assert function is functions()[loss.function]
    parameters = inspect.signature(function).parameters
    assert sorted(parameters) == sorted((*loss.inputs, *loss.settings))
    assert list(parameters)[: len(loss.inputs)] == list(loss.inputs)
    assert set(loss.inputs) <= INPUTS.keys() and set(loss.settings) <= SETTINGS.keys()
    assert {*loss.limits, *loss.papers} <= set(loss.settings)
    for name, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            assert parameter.default == SETTINGS[name].default, name


def test_every_input_and_setting_is_in_use() -> None:
    assert INPUTS.keys() == {name for loss in LOSSES.values() for name in loss.inputs}
    assert all(losses_served_by(name) for name in SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_serve_the_losses_that_they_change(setting: str) -> None:
    assert sorted(losses_served_by(setting)) == sorted(SERVED[setting])
    assert sorted(SERVED) == sorted(SETTINGS)


def test_a_setting_that_changes_compared_inputs_must_serve_each_loss_that_compares() -> None:
    assert is_served("wpo", ["sigmoid", "sft"]) and not is_served("wpo", ["sigmoid", "aot"])
    assert is_served("label_smoothing", ["sigmoid", "ipo"]) and not is_served("wpo", ["sft"])


def test_the_table_loads_no_torch() -> None:
    code = "import sys, dpo_cache.losses.terms, dpo_cache.options.losses; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_page_of_the_docs_has_the_tables() -> None:
    assert PAGE.read_text() == with_tables(PAGE.read_text()), "run `python -m tests.losses.write_table`"


# -- a new loss: an entry and a function -----------------------------------------------------------------


def pull_losses(margins: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """`beta (m - 1)^2`, with a share of the labels flipped."""
    return beta * ((1 - label_smoothing) * (margins - 1) ** 2 + label_smoothing * (margins + 1) ** 2)


PULL = Loss(
    name="pull",
    inputs=("margins",),
    settings=("beta", "label_smoothing"),
    formula="`b (m - 1)^2`",
    paper=DPO,
    tag="pulled",
    limits={"label_smoothing": Limit(lambda value: value < 0.3, "{flag} {value}: pull expects less.")},
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> str:
    folder = tmp_path_factory.mktemp("losses")
    for name, rows in (("pairs", chat_rows(15)), ("heldout", chat_rows(6, seed=9))):
        dpo_cache.precompute(model_folder, write_rows(folder / f"{name}.jsonl", rows), folder / "cache")
    return str(folder / "cache")


@pytest.fixture
def new_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "pull", PULL)
    monkeypatch.setattr(reference_losses, "pull_losses", pull_losses, raising=False)


def test_a_new_loss_trains_evaluates_and_is_documented(cache: str, tmp_path: Path, new_loss: None) -> None:
    options = {"loss": "pull", "label_smoothing": 0.1, "f_divergence": "js_divergence", "beta": 0.2}
    shared = {"pairs": "pairs", "eval_pairs": "heldout", "lr": 3e-3, "log": lambda _: None}
    run = dpo_cache.train(cache, tmp_path / "run", batch_size=6, **shared, **options)
    assert run.eval_before is not None and run.eval_after is not None
    assert run.eval_before["eval/loss"] == pytest.approx(0.2, rel=1e-3)  # margins are 0: beta
    assert run.eval_after["eval/loss"] != pytest.approx(run.eval_before["eval/loss"], rel=1e-3)
    report = dpo_cache.evaluate(cache, "heldout", run=tmp_path / "run", log=lambda _: None)
    assert report.loss == ["pull"]
    assert report.metrics["loss"] == pytest.approx(run.eval_after["eval/loss"], rel=1e-5)
    card = ModelCard((tmp_path / "run" / "model" / "README.md").read_text())
    assert "pulled" in card.data.tags and DPO.cite() in card.text and "| `pull` | weight 1 |" in card.text
    assert any(line.startswith("| `pull` | `b (m - 1)^2` | yes | sums |") for line in losses_table())


def test_options_are_checked_for_a_new_loss(new_loss: None) -> None:
    def grid(**options: object) -> object:
        return read_grid(SweepOptions(cache="cache", output="out", loss="pull,sigmoid", **options))

    grid(label_smoothing="0.1,0.2")
    with pytest.raises(OptionError, match=r"`label_smoothing` 0.3: pull expects less\."):
        grid(label_smoothing="0.3")
    with pytest.raises(OptionError, match="`simpo_gamma` 1.0 has no meaning under `loss` pull"):
        dpo_cache.train("cache", "run", loss="pull", simpo_gamma=1.0)
