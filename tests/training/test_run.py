"""The files of a run, how it can start, its reports and remarks."""

import json
import signal
from pathlib import Path

import pytest
import torch

import dpo_cache
from dpo_cache.errors import DpoCacheError, OptionError, TrainingError
from dpo_cache.lm import policy
from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.options.run_config import with_config
from dpo_cache.store import open_cache
from dpo_cache.training.batches import completions_of, longest_pairs
from dpo_cache.training.output.metrics_file import MetricsFile
from dpo_cache.training.output.report import Clock
from dpo_cache.training.warnings import WINDOW, RunWarnings
from tests import programs
from tests.conftest import make_llama
from tests.training.test_loop import FAST, Killed, comparable, cut_off, forest_sizes, metrics, train, weights
from tests.waiting import wait_until


def test_the_last_checkpoints_are_kept(cache: str, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    published: list[str] = []

    def look(line: dict) -> None:
        seen.append(sorted(path.name for path in (tmp_path / "run/checkpoints").glob("*")))

    train(
        cache,
        tmp_path / "run",
        save_every=1,
        keep=2,
        on_metrics=look,
        on_checkpoint=lambda path: published.append(path.name),
    )
    assert seen == [[], ["step-000001"], ["step-000001", "step-000002"], ["step-000002", "step-000003"]]
    assert published == ["step-000001", "step-000002", "step-000003"]


def test_checkpoints_by_epochs(cache: str, tmp_path: Path) -> None:
    published: list[str] = []
    train(
        cache,
        tmp_path / "run",
        save_every="0.5epochs",
        epochs=2.0,
        on_checkpoint=lambda path: published.append(path.name),
    )
    assert published == ["step-000002", "step-000004", "step-000006"]


def test_a_run_begins_from_the_options_of_another(cache: str, tmp_path: Path) -> None:
    options = {
        "beta": 0.3,
        "loss": ("sigmoid:0.5", "sft:0.5"),
        "eval_pairs": "heldout",
        "eval_every": 2,
        "seed": 4,
        "max_steps": 3,
    }
    train(cache, tmp_path / "one", **options)
    report = dpo_cache.train(
        output=tmp_path / "two", config=tmp_path / "one/config.json", log=lambda text: None
    )
    assert comparable(tmp_path / "one") == comparable(tmp_path / "two") and report.finished
    dpo_cache.train(
        output=tmp_path / "three", config=str(tmp_path / "one/config.json"), beta=0.1, log=lambda text: None
    )
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "three")]
    assert (configs[0]["beta"], configs[1]["beta"]) == (0.3, 0.1) and configs[1]["loss"] == configs[0][
        "loss"
    ] == ["sigmoid:0.5", "sft:0.5"]


def test_configs_that_are_none_are_refused(cache: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "new.json").write_text('{"beta": 0.1, "gamma_ray": 2}')
    for name, text in (
        ("absent.json", "not readable"),
        ("list.json", "not a JSON object"),
        ("new.json", "gamma_ray: no options of this version"),
    ):
        with pytest.raises(OptionError, match=text):
            train(cache, tmp_path / "run", config=str(tmp_path / name))


def test_a_dry_run_takes_a_step_on_the_longest_pairs_and_writes_nothing(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = forest_sizes(monkeypatch)
    remarks: list[str] = []
    shown: list[dict] = []
    report = train(
        cache, tmp_path / "run", dry_run=True, eval_pairs="heldout", log=remarks.append,
        on_metrics=shown.append,
    )  # fmt: skip
    assert [(line["step"], line["total_steps"]) for line in shown] == [(2, 2)]  # of the dry run
    assert (
        report.is_dry_run
        and not report.finished
        and report.peak_bytes > 0
        and report.resolved["total_steps"] == 4
    )
    assert not (tmp_path / "run").exists() and sorted(path.name for path in tmp_path.iterdir()) == []
    pairs = list(open_cache(cache).pairs("pairs"))
    longest = sorted(pairs, key=lambda scored: -len(scored.pair.chosen) - len(scored.pair.rejected))[:4]
    checked, steps = sizes[:2], sizes[2:]  # the gradient of a short pair, kept and recomputed
    assert checked[0] == checked[1] < 64
    assert sum(steps) == 2 * count_forest_tokens(completions_of(longest)), (
        "the second step has the optimizer's state and its activations"
    )
    assert sum("step zero" in remark for remark in remarks) == 1


def test_the_longest_pairs_come_longest_first(cache: str) -> None:
    pairs = open_cache(cache).pairs("pairs")
    selected = torch.ones(len(pairs), dtype=torch.bool).numpy()
    selected[::2] = False
    found = [
        len(scored.pair.chosen) + len(scored.pair.rejected) for scored in longest_pairs(pairs, selected, 3)
    ]
    every = sorted(
        (len(scored.pair.chosen) + len(scored.pair.rejected) for scored in list(pairs)[1::2]), reverse=True
    )
    assert found == every[:3]


def test_two_runs_give_the_same_bits(cache: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(cache, tmp_path / name, deterministic=True, max_steps=3, eval_pairs="heldout")
        assert not torch.are_deterministic_algorithms_enabled()
    assert comparable(tmp_path / "one") == comparable(tmp_path / "two")
    one, two = weights(tmp_path / "one/model"), weights(tmp_path / "two/model")
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def run_out_once(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The first pass with gradients runs out of memory, and again whenever the list is cleared."""
    real, full = policy.completion_logps, []

    def run_out(model, completions, attention, **options):  # type: ignore[no-untyped-def]
        if not full and torch.is_grad_enabled():
            full.append(True)
            raise torch.OutOfMemoryError
        return real(model, completions, attention, **options)

    monkeypatch.setattr(policy, "completion_logps", run_out)
    return full


def test_a_resumed_run_splits_its_steps_as_before(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ran out of memory continues with its last values, also when it is resumed."""
    full = run_out_once(monkeypatch)
    options = {"gradient_checkpointing": "none", "budget_tokens": "auto", "max_steps": 3}
    monkeypatch.setattr("dpo_cache.training.step_memory.default_micro_tokens", lambda device: 200)
    train(cache, tmp_path / "whole", **options)
    full.clear()
    train(cache, tmp_path / "cut", should_stop=lambda: True, **options)
    state = json.loads(next((tmp_path / "cut/checkpoints").iterdir()).joinpath("state.json").read_text())
    assert state["step_memory"]["pair_tokens"] == 200
    train(cache, tmp_path / "cut", resume=True, **options)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


def test_a_row_whose_loss_is_not_finite_is_named_and_the_checkpoint_kept(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = policy.completion_logps
    changed = next(scored for scored in open_cache(cache).pairs("pairs") if scored.pair.row == 6).pair.chosen

    def spoil(model, completions, attention, **options):  # type: ignore[no-untyped-def]
        found = real(model, completions, attention, **options)
        if not spoil.is_on:
            return found
        hits = [
            any(
                completion.sequence_ids.tolist() == changed.sequence_ids.tolist()
                for completion in completions
            )
        ]
        return (
            policy.CompletionLogps(found.tokens_T * torch.tensor(float("nan")), found.lengths)
            if hits[0]
            else found
        )

    spoil.is_on = False
    monkeypatch.setattr(policy, "completion_logps", spoil)

    def switch(line: dict) -> None:
        spoil.is_on = True

    with pytest.raises(
        TrainingError,
        match=r"loss nan, gradient norm nan; row 6 of the data made it(?s:.*)step-000001 holds an earlier state",
    ):
        train(cache, tmp_path / "run", save_every=1, shuffle=False, batch_size=5, on_metrics=switch)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]


def test_a_resumption_that_fails_leaves_the_folder(cache: str, tmp_path: Path) -> None:
    cut_off(cache, tmp_path / "run", 2)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(DpoCacheError):
        train(str(tmp_path / "absent"), tmp_path / "run", resume=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_metrics_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for number in range(6):
        file.append({"step": number})

    def fail(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("dpo_cache.files.atomic.os.replace", fail)
        file.keep_until(3, print)
    assert [line["step"] for line in file.lines()] == list(range(6))
    file.keep_until(3, print)
    assert [line["step"] for line in file.lines()] == [0, 1, 2, 3]


def test_a_split_that_ran_out_of_memory_is_kept_also_where_it_was_asked_for(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = run_out_once(monkeypatch)
    options = {"gradient_checkpointing": "full", "budget_tokens": "200", "max_steps": 3}
    train(cache, tmp_path / "whole", **options)
    full.clear()
    train(cache, tmp_path / "cut", should_stop=lambda: True, **options)
    train(cache, tmp_path / "cut", resume=True, **options)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    one, other = weights(tmp_path / "whole/model"), weights(tmp_path / "cut/model")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_given_option_replaces_its_exclusive_one_of_the_config(cache: str, tmp_path: Path) -> None:
    train(cache, tmp_path / "one", eval_fraction=0.4, max_steps=1, lora_r=2)
    config = tmp_path / "one/config.json"
    found = with_config({"config": config, "eval_pairs": "heldout", "peft_config": "lora.json"})
    assert "eval_fraction" not in found and "lora_r" not in found


def test_a_config_of_several_processes_is_used_by_one(cache: str, tmp_path: Path) -> None:
    train(cache, tmp_path / "one", max_steps=1)
    config = json.loads((tmp_path / "one/config.json").read_text())
    (tmp_path / "launched.json").write_text(json.dumps({**config, "launch": 2}))
    assert dpo_cache.train(output=tmp_path / "two", config=tmp_path / "launched.json").finished


@pytest.mark.rotating(3)
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"beta": None}, "`beta` None: expected a value"), ({"epochs": "two"}, "`epochs` 'two': expected "
            "a number"),
        ({"loss": 5}, "`loss` 5: expected text, or a list of texts"), ({"log_to": None}, "`log_to` None: "
            "expected text, or a list of texts"),
        ({"save_every": [2]}, r"`save_every` \[2\]: expected text"), ({"shuffle": "no"}, "`shuffle` 'no': "
            "expected true or false"),
    ],
)  # fmt: skip
def test_a_config_that_was_edited_wrongly_is_an_error(
    cache: str, tmp_path: Path, changes: dict, text: str
) -> None:
    train(cache, tmp_path / "one", max_steps=1)
    config = json.loads((tmp_path / "one/config.json").read_text())
    (tmp_path / "edited.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(OptionError, match=f"`config` .*edited.json: {text}"):
        dpo_cache.train(output=tmp_path / "two", config=tmp_path / "edited.json")


def test_the_opposite_is_seen_without_a_reference_too() -> None:
    remarks: list[str] = []
    warnings = RunWarnings(remarks.append, is_logistic=False, has_reference=False)
    for number in range(3 * WINDOW):
        drift = 0.02 * number
        warnings.note(
            step(
                number,
                **{
                    "rewards/chosen": -5 - drift,
                    "rewards/rejected": -6 + drift,
                    "rewards/margins": 1 - 2 * drift,
                },
            )
        )
    assert len(remarks) == 1 and "Are chosen and rejected swapped in the data?" in remarks[0]


def test_a_period_that_never_triggers_is_reported(cache: str, tmp_path: Path) -> None:
    remarks: list[str] = []
    train(cache, tmp_path / "run", save_every="100epochs", max_steps=2, log=remarks.append)
    assert "`save_every` 100epochs never triggers: the run has 2 steps." in remarks


def step(number: int, **values: float) -> dict:
    return {
        "step": number,
        "num_pairs": 32,
        "loss": 0.69,
        "rewards/accuracies": 0.7,
        "rewards/margins": 0.1,
        "rewards/chosen": 0.1,
        "rewards/rejected": 0.0,
        **values,
    }


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"rewards/chosen": -0.4, "rewards/rejected": 0.3, "rewards/margins": -0.7},
            "Are chosen and rejected swapped in the data?",
        ),
        ({"rewards/accuracies": 0.5}, "accuracy stays at 50%"),
        ({"loss": 1e-5, "rewards/accuracies": 1.0}, "margins are saturated"),
    ],
)
def test_signs_of_trouble_are_said_once_in_words(values: dict, text: str) -> None:
    remarks: list[str] = []
    warnings = RunWarnings(remarks.append, is_logistic=True)
    for number in range(3 * WINDOW):
        warnings.note(step(number, **values))
        assert bool(remarks) == (number >= WINDOW - 1)
    assert len(remarks) == 1 and text in remarks[0]


def test_a_run_that_goes_well_hears_nothing() -> None:
    remarks: list[str] = []
    warnings = RunWarnings(remarks.append, is_logistic=True)
    for number in range(100):  # the usual picture: both likelihoods fall, the rejected one faster
        warnings.note(
            step(
                number,
                **{
                    "rewards/chosen": -0.01 * number,
                    "rewards/rejected": -0.02 * number,
                    "rewards/accuracies": 0.6,
                    "loss": 0.5,
                },
            )
        )
    assert not remarks


def test_a_gradient_of_nothing_is_said() -> None:
    remarks: list[str] = []
    warnings = RunWarnings(remarks.append, is_logistic=True)
    for number in range(3):
        warnings.note({**step(number, loss=0.69), "grad_norm": 0.0 if number == 0 else 1.0})
    assert len(remarks) == 1 and "the gradient of the first step is 0" in remarks[0]


def test_a_sign_is_reported_once_also_by_a_resumed_run(cache: str, tmp_path: Path) -> None:
    options = {"epochs": 16.0, "lr": 6e-3, "batch_size": 5}
    remarks: dict[str, list[str]] = {"whole": []}
    train(cache, tmp_path / "whole", log=remarks["whole"].append, **options)
    last = len(metrics(tmp_path / "whole"))
    for stop in (10, last - 2):  # before and after the remark is logged
        seen: list[int] = []
        log = remarks.setdefault(f"stopped at {stop}", []).append
        watch = {
            "on_metrics": lambda line, seen=seen: seen.append(line["step"]),
            "should_stop": lambda seen=seen, stop=stop: seen[-1] == stop,
        }
        train(cache, tmp_path / f"cut-{stop}", log=log, **watch, **options)
        assert seen[-1] == stop
        train(cache, tmp_path / f"cut-{stop}", log=log, resume=True, **options)
    told = [[remark for remark in those if "saturated" in remark] for those in remarks.values()]
    assert len(told[0]) == 1 and told[1:] == [told[0], told[0]]


def test_remaining_time_counts_steps_and_evaluations() -> None:
    clock = Clock()
    assert clock.left_s(10, 1) is None
    clock.steps_s += [2.0, 4.0]
    clock.evaluations_s.append(5.0)
    assert clock.left_s(10, 2) == 40.0


def test_progress_has_the_remaining_steps_and_time(cache: str, tmp_path: Path) -> None:
    seen: list[dict] = []
    train(cache, tmp_path / "run", on_metrics=seen.append, eval_pairs="heldout", eval_every=2)
    steps = [line for line in seen if "loss" in line]
    assert all(line["left_s"] > 0 for line in steps[:-1]) and steps[-1]["total_steps"] == 4
    assert "left_s" not in metrics(tmp_path / "run")[1]


def test_sigterm_saves_first(cache: str, tmp_path: Path) -> None:
    """A real process, stopped from outside, resumed to the same bits as one that was not."""
    command = [
        "train",
        "--cache",
        cache,
        "--pairs",
        "pairs",
        "--batch-size",
        "2",
        "--epochs",
        "40",
        "--lr",
        "1e-4",
    ]
    program = programs.start(*command, "--output", str(tmp_path / "run"))
    try:
        started = (tmp_path / "run/metrics.jsonl").exists
        wait_until(lambda: program.has_ended() or started(), "the first line of metrics.jsonl")
        program.send_signal(signal.SIGTERM)
        done = program.wait()
    finally:
        program.kill()
    assert done.code == 143, done.err
    checkpoints = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert len(checkpoints) == 1 and len(metrics(tmp_path / "run")) == int(
        checkpoints[0].removeprefix("step-")
    )


def test_no_parameter_of_the_reference_is_ever_made(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.nn.Module] = []
    init = type(make_llama()).__init__
    monkeypatch.setattr(
        type(make_llama()),
        "__init__",
        lambda self, *args, **kwargs: (made.append(self), init(self, *args, **kwargs))[1],
    )
    train(cache, tmp_path / "run", max_steps=1)
    # the checks before loading make one without weights
    with_weights = [model for model in made if not all(one.is_meta for one in model.parameters())]
    assert (len(made), len(with_weights)) == (2, 1)


def test_callbacks_that_raise_end_the_run_and_keep_its_checkpoints(cache: str, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        dpo_cache.train(cache, tmp_path / "run", pairs="pairs", save_every=1, on_checkpoint=fail, **FAST)
    assert dpo_cache.train(cache, tmp_path / "run", pairs="pairs", save_every=1, resume=True, **FAST).finished
