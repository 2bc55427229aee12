import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import dpo_cache
from dpo_cache.errors import ModelError, NotInCacheError, OptionError, StepZeroError, TrainingError
from dpo_cache.lm import policy
from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.lm.memory.recompute import Recomputation, activation_bytes
from dpo_cache.store import open_cache
from dpo_cache.training import loop
from dpo_cache.training import step_memory as step_memory
from dpo_cache.training.output import checkpoint
from tests.conftest import chat_rows, make_llama, make_tokenizer, naive_token_logps, write_rows

FAST = {"batch_size": 4, "lr": 1e-3, "log": lambda text: None}
KEYS = {
    "step", "epoch", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "grad_norm", "lr", "num_pairs", "num_tokens", "pairs_per_s", "peak_bytes",
}  # fmt: skip


def train(cache: str, output: Path, **options: object) -> dpo_cache.TrainReport:
    return dpo_cache.train(cache, str(output), **{"pairs": "pairs", **FAST, **options})


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def comparable(output: Path) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key not in ("pairs_per_s", "peak_bytes")}
        for line in metrics(output)
    ]


def assert_alike(ones: list[dict], others: list[dict]) -> None:
    """The lines of two runs of the same steps agree up to rounding."""
    # before the first update margins are zero up to rounding
    signs_of_zero = {"rewards/accuracies", "eval/rewards/accuracies"}
    for one, other in zip(ones, others, strict=True):
        for name in set(one) - {"pairs_per_s", "peak_bytes", "num_tokens"} - signs_of_zero:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_run_holds_config_metrics_and_a_model_that_loads(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", eval_pairs="heldout")
    assert report.finished and report.num_steps == 4 and report.num_pairs == 15
    lines = metrics(tmp_path / "run")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(set(line) == KEYS for line in steps)
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 4]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["batch_size"] == 4 and config["resolved"]["num_pairs"] == 15
    tokenizer = AutoTokenizer.from_pretrained(report.model)
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "model",
    ]
    trained = weights(report.model)
    assert any(not torch.equal(value, trained[name]) for name, value in make_llama().state_dict().items())


def test_at_step_zero_every_reward_is_zero_and_every_loss_ln_2(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", eval_pairs="heldout", max_steps=1)
    assert report.step_zero_gap is not None and report.step_zero_gap < 1e-4
    for line, prefix in ((report.eval_before, "eval/"), (report.first, "")):
        assert line is not None
        assert line[f"{prefix}loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
        assert abs(line[f"{prefix}rewards/chosen"]) < 1e-5 and abs(line[f"{prefix}rewards/rejected"]) < 1e-5


NAIVE = {
    "as it comes": {},
    "another beta": {"beta": 0.5},
    "cDPO": {"label_smoothing": 0.2},
    "IPO": {"loss": "ipo", "beta": 0.2},
    "no reference": {"reference_free": True},
    "weight decay": {"weight_decay": 0.3},
    "never clipped": {"max_grad_norm": 0.0},
    "another rate": {"lr": 3e-3},
}


@pytest.mark.rotating(2)
@pytest.mark.parametrize("changes", NAIVE.values(), ids=NAIVE)
def test_metrics_and_weights_are_those_of_a_naive_loop(cache: str, tmp_path: Path, changes: dict) -> None:
    options = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "loss": "sigmoid",
        "reference_free": False,
        "weight_decay": 0.0,
        "max_grad_norm": 0.5,
        **changes,
    }
    rate = {"lr_schedule": "constant", "warmup_ratio": 0.0, "lr": 1e-3, **changes}
    report = train(cache, tmp_path / "run", shuffle=False, max_steps=2, batch_size=5, **{**options, **rate})
    model = make_llama()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": decayed, "weight_decay": options["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate["lr"])
    pairs = list(open_cache(cache).pairs("pairs"))
    for line, batch in zip(metrics(tmp_path / "run"), (pairs[:5], pairs[5:10]), strict=True):
        sums = []
        for completion in [entry.pair.chosen for entry in batch] + [entry.pair.rejected for entry in batch]:
            ids = torch.from_numpy(completion.sequence_ids.astype("int64"))[None]
            logps = model(input_ids=ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            sums.append(logps[len(completion.prompt_ids) - 1 :].double().sum())
        reference = [entry.ref_chosen.logps for entry in batch] + [
            entry.ref_rejected.logps for entry in batch
        ]
        chosen, rejected = torch.stack(sums).chunk(2)
        ref_chosen, ref_rejected = torch.tensor(reference, dtype=torch.float64).chunk(2)
        margins = chosen - rejected - (0 if options["reference_free"] else ref_chosen - ref_rejected)
        if options["loss"] == "ipo":
            losses = (margins - 1 / (2 * options["beta"])) ** 2
        else:
            smoothing, scaled = options["label_smoothing"], options["beta"] * margins
            losses = -(1 - smoothing) * scaled.sigmoid().log() - smoothing * (-scaled).sigmoid().log()
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options["max_grad_norm"] or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        # sums of log-probs are known to some 1e-5 nats in float32, and so is a loss near 0
        assert line["loss"] == pytest.approx(losses.mean().item(), rel=1e-5, abs=1e-6)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        gaps = options["beta"] * ((chosen - ref_chosen) - (rejected - ref_rejected))
        assert line["rewards/margins"] == pytest.approx(gaps.mean().item(), abs=1e-4)
        assert line["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    trained = weights(report.model)
    moved = max(
        float((value - make_llama().state_dict()[name]).abs().max()) for name, value in trained.items()
    )
    gap = max(float((value - trained[name]).abs().max()) for name, value in model.state_dict().items())
    assert gap < 0.05 * moved


def test_clipping_scales_the_gradient_that_the_optimizer_sees(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def note(self: torch.optim.AdamW) -> None:
        norms.append(
            float(
                torch.nn.utils.get_total_norm(
                    [parameter.grad for group in self.param_groups for parameter in group["params"]]
                )
            )
        )
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    train(cache, tmp_path / "clipped", max_steps=1, max_grad_norm=0.25)
    train(cache, tmp_path / "free", max_steps=1, max_grad_norm=0.0)
    assert norms[0] == pytest.approx(0.25, rel=1e-3) and norms[1] > 1


def forest_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forest that is run from here on."""
    sizes: list[int] = []
    real = policy.completion_logps

    def note(model, completions, attention, **options):  # type: ignore[no-untyped-def]
        sizes.append(count_forest_tokens(completions))
        return real(model, completions, attention, **options)

    monkeypatch.setattr(policy, "completion_logps", note)
    return sizes


def test_a_step_is_run_in_as_many_forests_as_its_budget_needs(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = forest_sizes(monkeypatch)
    report = train(cache, tmp_path / "run", max_steps=1, batch_size=8, budget_tokens="100", step_zero="off")
    assert len(sizes) > 4 and max(sizes) <= 100
    # the first two forests are the short pair of the gradient check, the last one checks the saved model
    assert report.last is not None and report.last["num_tokens"] == sum(sizes[2:-1])


def test_checkpointing_recomputes_the_layers(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = LlamaDecoderLayer.forward

    def note(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", note)
    counts = []
    for mode in ("none", "selective", "full"):
        calls.clear()
        train(cache, tmp_path / mode, max_steps=1, gradient_checkpointing=mode)
        counts.append(len(calls))
    # both layers once more: of the one forest, and of the short pair on which both gradients are compared
    assert counts[1] == counts[2] == counts[0] + 2 + (2 + 2 + 2)


def test_a_step_that_runs_out_of_memory_is_taken_again_with_less(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"batch_size": 8, "max_steps": 2, "lr": 1e-4, "budget_tokens": "1000"}
    train(cache, tmp_path / "whole", **options)
    modes: list[str] = []
    forward = policy.completion_logps

    def run_out(model, completions, attention, **extra):
        if torch.is_grad_enabled() and run_out.run is not None:
            mode = run_out.run.setup.step_memory.mode
            modes.append(mode)
            if mode != "full" or len(completions) > 8:
                raise torch.OutOfMemoryError
        return forward(model, completions, attention, **extra)

    init = loop._Run.__init__
    run_out.run = None

    def note(self, *arguments):
        init(self, *arguments)
        run_out.run = self

    monkeypatch.setattr(loop._Run, "__init__", note)
    monkeypatch.setattr(policy, "completion_logps", run_out)
    remarks: list[str] = []
    train(cache, tmp_path / "tight", log=remarks.append, **options)
    said = [
        remark.removeprefix("out of memory; the step is repeated, and the run continues, with ")
        for remark in remarks
        if "memory" in remark
    ]
    assert said[:2] == [
        "`gradient_checkpointing` full. Nothing is lost.",
        "`budget_tokens` 500. Nothing is lost.",
    ]
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "tight"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_step_begun_anew_is_counted_once(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"batch_size": 8, "max_steps": 1, "budget_tokens": "100"}
    forward, calls = policy.completion_logps, []

    def run_out(model, completions, attention, **options):
        if torch.is_grad_enabled():
            calls.append(len(completions))
            if len(calls) == 4:  # the first two are those of the gradient check
                raise torch.OutOfMemoryError
        return forward(model, completions, attention, **options)

    once, again = [], []
    train(cache, tmp_path / "once", **options, log=once.append)
    monkeypatch.setattr(policy, "completion_logps", run_out)
    train(cache, tmp_path / "again", **options, log=again.append)
    assert len(calls) > 5 and once[-1].startswith("step zero: ")
    assert [remark for remark in again if remark.startswith("step zero")] == once[-1:]
    exact = [key for key in comparable(tmp_path / "once")[0] if key != "grad_norm"]
    for one, other in zip(comparable(tmp_path / "once"), comparable(tmp_path / "again"), strict=True):
        assert {key: one[key] for key in exact} == {key: other[key] for key in exact}


def test_memory_that_never_suffices_is_an_error(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(policy, "completion_logps", run_out)
    with pytest.raises(
        TrainingError,
        match=r"out of memory even with one answer at once\.\nUse `memory` small \([\d.]+ kB of",
    ):
        train(cache, tmp_path / "run", max_steps=1)
    assert not (tmp_path / "run").exists()


def test_another_error_is_not_taken_for_a_lack_of_memory(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(policy, "completion_logps", fail)
    with pytest.raises(RuntimeError, match="something else"):
        train(cache, tmp_path / "run", max_steps=1)


def test_a_host_with_little_memory_recomputes_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    for share, expected in ((0.5, "cheap"), (1e-9, "full")):
        monkeypatch.setattr(step_memory, "SHARE_OF_FREE", share)
        assert (
            step_memory.StepMemory(model := make_llama(), Recomputation(model), 1000, "auto", print).mode
            == expected
        )
    assert (
        activation_bytes(model, 1000, "none")
        > activation_bytes(model, 1000, "selective")
        > activation_bytes(model, 1000, "full")
        > 0
    )


@pytest.mark.parametrize(("precision", "weights_dtype", "inner_dtype"), [
    ("fp32", torch.float32, torch.float32), ("bf16-mixed", torch.float32, torch.bfloat16), ("bf16", torch.bfloat16, torch.bfloat16),
])  # fmt: skip
def test_each_precision_computes_in_its_dtype(
    cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    weights_dtype: torch.dtype,
    inner_dtype: torch.dtype,
) -> None:
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    real = policy.completion_logps

    def note(model, completions, attention, **options):  # type: ignore[no-untyped-def]
        layer = model.model.layers[0].mlp.up_proj
        hook = layer.register_forward_hook(
            lambda module, inputs, output: seen.add((module.weight.dtype, output.dtype))
        )
        logps = real(model, completions, attention, **options)
        hook.remove()
        return logps

    monkeypatch.setattr(policy, "completion_logps", note)
    train(cache, tmp_path / "run", precision=precision, max_steps=1, batch_size=2)
    assert seen == {(weights_dtype, inner_dtype)}


def test_evaluations_come_when_they_are_asked_for_and_after_updates(cache: str, tmp_path: Path) -> None:
    train(
        cache, tmp_path / "run", eval_pairs="heldout", eval_every=2, batch_size=4, lr=1e-2, warmup_ratio=0.0
    )
    lines = metrics(tmp_path / "run")
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    assert len({line["eval/loss"] for line in evaluations}) == 3
    assert [line["epoch"] for line in lines if "loss" in line] == [
        pytest.approx(done / 15, abs=1e-4) for done in (4, 8, 12, 15)
    ]


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("epochs", "batch_size", "num_steps"), [(3.0, 32, 3), (2.0, 4, 8), (0.5, 4, 2), (1.0, 15, 1)]
)
def test_epochs_are_whole_passes(
    cache: str, tmp_path: Path, epochs: float, batch_size: int, num_steps: int
) -> None:
    report = train(cache, tmp_path / "run", epochs=epochs, batch_size=batch_size)
    assert report.num_steps == num_steps
    assert report.last is not None and report.last["epoch"] == pytest.approx(max(epochs, 8 / 15), abs=1e-4)


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    "options",
    [
        {"budget_tokens": "1"},
        {"budget_tokens": "60"},
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": "full"},
    ],
)
def test_how_a_step_is_run_changes_nothing_beyond_rounding(cache: str, tmp_path: Path, options: dict) -> None:
    train(cache, tmp_path / "whole", batch_size=8, budget_tokens="100000", max_steps=2, lr=1e-4)
    train(cache, tmp_path / "split", batch_size=8, max_steps=2, lr=1e-4, **options)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "split"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.rotating(3)
@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 7])
def test_resumed_equals_uninterrupted_bit_for_bit(cache: str, tmp_path: Path, stop_after: int) -> None:
    options = {"epochs": 2.0, "eval_pairs": "heldout", "eval_every": 2, "weight_decay": 0.1}
    train(cache, tmp_path / "whole", **options)
    steps_seen: list[int] = []

    def note(line: dict) -> None:
        steps_seen.append(line["step"])

    stopped = train(
        cache, tmp_path / "cut", on_metrics=note, should_stop=lambda: steps_seen[-1] >= stop_after, **options
    )
    assert not stopped.finished and stopped.num_steps == stop_after
    resumed = train(cache, tmp_path / "cut", resume=True, **options)
    assert resumed.finished and resumed.step_zero_gap is None
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    one, other = weights(tmp_path / "whole" / "model"), weights(tmp_path / "cut" / "model")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_lines_written_past_the_checkpoint_are_dropped_on_resume(cache: str, tmp_path: Path) -> None:
    train(cache, tmp_path / "whole")

    def crash(line: dict) -> None:
        if line["step"] == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        train(cache, tmp_path / "cut", save_every=2, on_metrics=crash)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    train(cache, tmp_path / "cut", save_every=2, resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


def cut_off(cache: str, output: Path, at_step: int, **options: object) -> None:
    """A run that dies as by SIGKILL right after a step."""

    def crash(line: dict) -> None:
        if line["step"] == at_step and "loss" in line:
            raise Killed

    with pytest.raises(Killed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "discard", lambda folder: None)
        train(cache, output, on_metrics=crash, **options)


class Killed(BaseException):
    pass


def test_a_run_cut_off_before_its_first_checkpoint_starts_again(cache: str, tmp_path: Path) -> None:
    remarks: list[str] = []
    train(cache, tmp_path / "whole")
    cut_off(cache, tmp_path / "cut", 2)
    with pytest.raises(TrainingError, match="Continue its run with `resume`"):
        train(cache, tmp_path / "cut")
    assert train(cache, tmp_path / "cut", resume=True, log=remarks.append).finished
    assert "cut off before its first checkpoint" in remarks[0]
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


def test_a_run_killed_after_its_model_was_saved_is_finished(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dpo_cache.training.saving.remove_leftovers", lambda folder: None)
        train(cache, tmp_path / "run", save_every=1)
    assert (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(TrainingError, match="this run is finished"):
        train(cache, tmp_path / "run", save_every=1, resume=True)


def test_a_resumed_run_needs_nothing_but_the_cache(model_folder: str, tmp_path: Path) -> None:
    folder = tmp_path / "reference"
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    dpo_cache.precompute(folder, write_rows(tmp_path / "pairs.jsonl", chat_rows(12)), tmp_path / "cache")
    stopped = train(str(tmp_path / "cache"), tmp_path / "run", should_stop=lambda: True, eval_fraction=0.4)
    folder.rename(tmp_path / "gone")
    report = train(str(tmp_path / "cache"), tmp_path / "run", resume=True, eval_fraction=0.4)
    assert report.finished and report.first == stopped.first and report.eval_before == stopped.eval_before
    assert AutoTokenizer.from_pretrained(report.model).chat_template == make_tokenizer().chat_template


@pytest.mark.rotating(3)
@pytest.mark.parametrize("name", ["config.json", "checkpoints/step-000002/state.json", "checkpoints/step-000002/optimizer.safetensors",
                                  "checkpoints/step-000002/model.safetensors"])  # fmt: skip
@pytest.mark.parametrize("damage", ["gone", "torn", "empty"])
def test_a_damaged_run_is_an_error(cache: str, tmp_path: Path, name: str, damage: str) -> None:
    cut_off(cache, tmp_path / "run", 3, save_every=2)
    path = tmp_path / "run" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[: len(content) // 2] if damage == "torn" else b"")
    with pytest.raises(TrainingError, match=f"{path.name}: not readable"):
        train(cache, tmp_path / "run", save_every=2, resume=True)


def test_a_full_disk_while_saving_is_an_error_and_leaves_nothing_half_written(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: File too large (os error 27)")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(TrainingError, match=r"cannot save .*step-000001: I/O error: File too large"):
        train(cache, tmp_path / "run", save_every=1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == []


def test_paths_may_be_paths(cache: str, tmp_path: Path) -> None:
    assert dpo_cache.train(Path(cache), tmp_path / "run", pairs="pairs", max_steps=1, **FAST).finished


def test_only_the_last_checkpoint_is_kept(cache: str, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def look(line: dict) -> None:
        seen.append(sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*")))

    train(cache, tmp_path / "run", save_every=1, on_metrics=look)
    assert seen == [[], ["step-000001"], ["step-000002"], ["step-000003"]]


def test_resuming_with_other_options_names_them(cache: str, tmp_path: Path) -> None:
    train(cache, tmp_path / "run", should_stop=lambda: True)
    with pytest.raises(
        TrainingError, match=r"this run was started with other options:\n  beta: 0.1 before, 0.5 now"
    ):
        train(cache, tmp_path / "run", resume=True, beta=0.5)


def test_training_order_depends_only_on_the_seed(cache: str, tmp_path: Path) -> None:
    losses = []
    for name, seed, global_seed in (("a", 1, 0), ("b", 1, 99), ("c", 2, 0)):
        torch.manual_seed(global_seed)
        train(cache, tmp_path / name, seed=seed, max_steps=2)
        losses.append([line["logps/chosen"] for line in metrics(tmp_path / name)])
    assert losses[0] == losses[1] != losses[2]


def test_a_fraction_is_held_out_by_prompt(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", eval_fraction=0.3)
    assert report.eval_before is not None and report.eval_before["eval/num_pairs"] + report.num_pairs == 15


def test_neither_data_set_nor_reference_is_needed_given_a_model(model_folder: str, tmp_path: Path) -> None:
    folder, data = tmp_path / "reference", write_rows(tmp_path / "pairs.jsonl", chat_rows(6))
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    dpo_cache.precompute(str(folder), data, str(tmp_path / "cache"))
    folder.rename(tmp_path / "gone")
    Path(data).unlink()
    with pytest.raises(ModelError, match="is gone.\nName the model that the policy starts from with `model`"):
        train(str(tmp_path / "cache"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(str(tmp_path / "cache"), tmp_path / "run", model=model_folder).finished


def test_a_stale_cache_is_caught_at_step_zero_before_any_update(model_folder: str, tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "cache", create=True)
    dpo_cache.precompute(
        model_folder, write_rows(tmp_path / "pairs.jsonl", chat_rows(6)), str(tmp_path / "cache")
    )
    pairs = list(cache.pairs("pairs"))
    changed = dpo_cache.Score(pairs[2].ref_rejected.token_logps + 0.01)
    pairs[2] = dpo_cache.ScoredPair(pairs[2].pair, pairs[2].ref_chosen, changed)
    manifest = cache.pairs("pairs").manifest
    writer = cache.write_pairs("pairs", "train")
    writer.add(pairs)
    writer.finish(
        {key: value for key, value in manifest.items() if key not in ("num_pairs", "parts", "format")}
    )
    with pytest.raises(
        StepZeroError,
        match=r"the policy is the reference, but its log-prob of a completion of row 2 is (?s:.*)Likely cause: cache: only the values of row 2 differ",
    ):
        train(str(tmp_path / "cache"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_policy_than_the_reference_is_said_not_refused(cache: str, tmp_path: Path) -> None:
    other, remarks = tmp_path / "other", []
    make_llama(seed=3).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    report = train(cache, tmp_path / "run", model=str(other), max_steps=1, log=remarks.append)
    assert report.step_zero_gap is not None and report.step_zero_gap > 1
    assert any("the policy is another model than the reference" in remark for remark in remarks)


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(cache: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"(?s)of the data made it. The weights were not updated"):
        train(cache, tmp_path / "run", lr=1e30, lr_schedule="constant", warmup_ratio=0.0, max_grad_norm=0)


def test_a_last_update_that_ruins_the_model_saves_none(cache: str, tmp_path: Path) -> None:
    """Its weights are finite, and what they give is not."""
    with pytest.raises(
        TrainingError, match=r"step 1: after the update the loss of row \d+ is not finite; no model was saved"
    ):
        train(
            cache, tmp_path / "run", lora_r=4, max_steps=1, lr=1e30, lr_schedule="constant", warmup_ratio=0.0
        )
    assert not (tmp_path / "run/model").exists()


def test_a_run_without_a_step_is_refused(cache: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="`epochs` 1e-12: not a single step"):
        train(cache, tmp_path / "run", epochs=1e-12)
    assert not (tmp_path / "run").exists()


def test_bf16_mixed_runs_and_is_close(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", precision="bf16-mixed", max_steps=1, batch_size=2)
    assert report.first is not None and report.first["loss"] == pytest.approx(0.693, abs=0.1)
    assert next(iter(weights(report.model).values())).dtype == torch.float32


def test_folders_that_do_not_fit_are_refused(cache: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(
        TrainingError, match="not the folder of a run; it holds notes.txt.\nChoose another `output`"
    ):
        train(cache, tmp_path / "full")
    with pytest.raises(TrainingError, match="there is no run to resume"):
        train(cache, tmp_path / "absent", resume=True)
    train(cache, tmp_path / "done", max_steps=1)
    with pytest.raises(TrainingError, match="this run is finished"):
        train(cache, tmp_path / "done", max_steps=1, resume=True)


def test_pair_sets_and_references_that_do_not_fit_are_refused(
    cache: str, model_folder: str, tmp_path: Path
) -> None:
    with pytest.raises(NotInCacheError, match=r"no pair set 'absent'.\nIt holds: heldout/train, pairs/train"):
        train(cache, tmp_path / "run", pairs="absent")
    with pytest.raises(
        NotInCacheError,
        match="several pair sets to train on.\nName one with `pairs`: heldout/train, pairs/train",
    ):
        train(cache, tmp_path / "run", pairs=None)
    with pytest.raises(NotInCacheError, match="no reference whose id starts with 'ffff'"):
        train(cache, tmp_path / "run", reference="ffff")
    cache = str(shutil.copytree(cache, tmp_path / "copy"))
    dpo_cache.precompute(
        model_folder, write_rows(tmp_path / "bf16.jsonl", chat_rows(2)), cache, dtype="bfloat16"
    )
    with pytest.raises(TrainingError, match="was scored by reference"):
        train(cache, tmp_path / "run", eval_pairs="bf16")
    with pytest.raises(NotInCacheError, match="was scored by reference"):
        train(cache, tmp_path / "run", reference=open_cache(cache).pairs("bf16").reference_id)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0}, {"beta": -1.0}, {"label_smoothing": 0.6}, {"label_smoothing": -0.1}, {"label_smoothing": 0.1, "loss": "ipo"},
        {"loss": "hinges"}, {"batch_size": 0}, {"epochs": 0.0}, {"lr": 0.0}, {"warmup_ratio": 2.0}, {"budget_tokens": "0"},
        {"eval_fraction": 1.0},
        {"seed": -1}, {"epochs": float("inf")}, {"lr": float("inf")}, {"beta": float("nan")}, {"batch_size": 2.5},
        {"eval_fraction": 0.5, "eval_pairs": "heldout"}, {"max_grad_norm": -1.0},
    ],
)  # fmt: skip
def test_options_without_sense_are_refused(cache: str, tmp_path: Path, options: dict) -> None:
    with pytest.raises(OptionError):
        train(cache, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_found_before_training(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000, "total": 2000}))
    with pytest.raises(TrainingError, match="are needed for the model and its checkpoints"):
        train(cache, tmp_path / "run")


def test_the_trained_model_prefers_the_chosen_answers(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", epochs=6.0, lr=2e-3)
    model, reference = AutoModelForCausalLM.from_pretrained(report.model), make_llama()
    wins = 0
    pairs = list(open_cache(cache).pairs("pairs"))
    for entry in pairs:
        gains = [
            float((naive_token_logps(model, side) - naive_token_logps(reference, side)).sum())
            for side in (entry.pair.chosen, entry.pair.rejected)
        ]
        wins += gains[0] > gains[1]
    assert wins >= 0.8 * len(pairs)
