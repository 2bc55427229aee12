"""What people who build on the package see: names, signatures, errors, reprs, silence, and the docs' examples."""

import importlib.util
import inspect
import logging
import math
import os
import pydoc
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_cache
from dpo_cache import errors
from dpo_cache.options.base import Options
from dpo_cache.options.evaluate import EvalOptions
from dpo_cache.options.exchange import ExportOptions, ImportOptions
from dpo_cache.options.plan import PlanOptions
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.options.sweep import SweepOptions
from dpo_cache.options.train import TrainOptions
from dpo_cache.options.upkeep import CompactOptions, MergeOptions, PullOptions, PushOptions, VerifyOptions
from tests import programs
from tests.conftest import chat_rows, make_llama, make_tokenizer, write_rows
from tests.sweeping.conftest import started  # noqa: F401  runs of a sweep in this process
from tests.write_stub import STUB, stub

ROOT = Path(dpo_cache.__file__).parents[1]
OPTIONS = {
    "plan": PlanOptions, "precompute": PrecomputeOptions, "train": TrainOptions, "evaluate": EvalOptions, "sweep": SweepOptions,
    "export_pairs": ExportOptions, "import_pairs": ImportOptions, "verify": VerifyOptions,
    "compact": CompactOptions, "merge": MergeOptions, "push": PushOptions, "pull": PullOptions,
}  # fmt: skip
FAST = {"batch_size": 4, "max_steps": 2, "deterministic": True}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> str:
    folder = tmp_path_factory.mktemp("api")
    for name, seed in (("pairs", 0), ("heldout", 9)):
        data = write_rows(folder / f"{name}.jsonl", chat_rows(9, seed=seed))
        dpo_cache.precompute(model_folder, data, folder / "cache")
    return str(folder / "cache")


@pytest.fixture(scope="module")
def own_loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_loop", ROOT / "examples" / "own_loop.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- names and signatures ------------------------------------------------------------------------------


def test_the_names_are_listed_and_torch_is_not_imported() -> None:
    code = """
import sys, dpo_cache
assert set(dpo_cache.__all__) <= set(dir(dpo_cache)) and "__version__" in dir(dpo_cache)
dpo_cache.OptionError, dpo_cache.Cache, dpo_cache.PairSet, dpo_cache.open_cache, dpo_cache.Completion
assert "torch" not in sys.modules
try:
    dpo_cache.trian
except AttributeError as error:
    assert str(error) == "module 'dpo_cache' has no attribute 'trian'"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_error_is_exported_and_in_the_tree() -> None:
    classes = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    tree = re.findall(r"^[ │├└─]*(\w+Error)\b", str(errors.__doc__), re.M)
    assert classes <= set(dpo_cache.__all__) and sorted(tree) == sorted(classes)


def test_the_stub_is_that_of_the_option_classes() -> None:
    assert STUB.read_text() == stub(), "run `python -m tests.write_stub`"


@pytest.mark.parametrize("name", OPTIONS)
def test_signature_and_help_have_every_option(name: str) -> None:
    function, options = getattr(dpo_cache, name), OPTIONS[name]
    parameters, text = inspect.signature(function).parameters, pydoc.render_doc(function)
    for entry in fields(options):
        assert entry.name in parameters
        if parameters[entry.name].kind is inspect.Parameter.KEYWORD_ONLY and entry.name not in (
            "model", "jobs", "resume", "plot", "reference",
        ):  # fmt: skip
            assert f"{entry.name}: " in text
            default = parameters[entry.name].default
            assert entry.metadata["required"] or default == getattr(_defaults(options), entry.name)
    assert not any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in parameters.values())


def _defaults(options: type[Options]) -> Options:
    """The options with a value for each that is required."""
    text = {entry.name: "x" for entry in fields(options) if entry.metadata["required"]}
    text |= {"remote": "s3://x"} if options in (PushOptions, PullOptions) else {}
    return options(**text)


def test_an_option_that_the_stub_lacks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    signature = inspect.signature(dpo_cache.train)
    longer = inspect.Parameter("newest", inspect.Parameter.KEYWORD_ONLY, default=1, annotation="int")
    monkeypatch.setattr(
        dpo_cache.train,
        "__signature__",
        signature.replace(parameters=[*signature.parameters.values(), longer]),
    )
    assert STUB.read_text() != stub()


# -- wrong keywords ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dpo_cache.train("c", "r", bata=0.1), "train() has no option bata.\nDid you mean beta?"),
        (lambda: dpo_cache.train("c", "r", learning_rate=1), "train() has no option learning_rate.\nDid you mean lr?"),
        (lambda: dpo_cache.train("c", "r", micro_token=1), "train() has no option micro_token.\nDid you mean budget_tokens?"),
        (
            lambda: dpo_cache.precompute("m", "d", "c", expect_refernce="r"),
            "precompute() has no option expect_refernce.\nDid you mean reference?",
        ),
        (
            lambda: dpo_cache.train("c", "r", gradient_accumulation_steps=4),
            "train() has no option gradient_accumulation_steps.\nGive batch_size, the pairs of one update: "
            "budget_tokens, which is found by itself, decides how many of them are run at once.",
        ),
        (lambda: dpo_cache.open_cache("c", creat=True), "open_cache() has no option creat.\nDid you mean create?"),
        (
            lambda: dpo_cache.open_cache("c", zzz=True),
            "open_cache() has no option zzz.\n`help(dpo_cache.open_cache)` lists the options.",
        ),
        (
            lambda: dpo_cache.training_batches(None, bach_size=1),
            "training_batches() has no option bach_size.\nDid you mean batch_size?",
        ),
        (lambda: dpo_cache.train("c", "r", on_metric=1), "train() has no option on_metric.\nDid you mean on_metrics?"),
        (lambda: dpo_cache.train("c", "r", progres=1), "train() has no option progres.\nDid you mean progress?"),
        (
            lambda: dpo_cache.train("c", "r", zzz=1),
            "train() has no option zzz.\n`help(dpo_cache.train)` lists the options.",
        ),
        (
            lambda: dpo_cache.precompute("m", "d", "c", max_lenght=1),
            "precompute() has no option max_lenght.\nDid you mean max_length?",
        ),
        (
            lambda: dpo_cache.evaluate("c", "p", "m", budget_token=1),
            "evaluate() has no option budget_token.\nDid you mean budget_tokens?",
        ),
        (lambda: dpo_cache.sweep("c", "o", job=2), "sweep() has no option job.\nDid you mean jobs?"),
        (
            lambda: dpo_cache.export_pairs("c", "p", "o", token_logp=True),
            "export_pairs() has no option token_logp.\nDid you mean token_logps?",
        ),
        (
            lambda: dpo_cache.import_pairs("c", "d", reference="r", splits="train"),
            "import_pairs() has no option splits.\nDid you mean split?",
        ),
        (lambda: dpo_cache.verify("c", repare=True), "verify() has no option repare.\nDid you mean repair?"),
        (
            lambda: dpo_cache.compact("c", references="r"),
            "compact() has no option references.\nDid you mean reference?",
        ),
        (lambda: dpo_cache.merge("a", "b", prefers="src"), "merge() has no option prefers.\nDid you mean prefer?"),
        (lambda: dpo_cache.push("a", "s3://b", pair="p"), "push() has no option pair.\nDid you mean pairs?"),
        (lambda: dpo_cache.pull("s3://b", "a", pair="p"), "pull() has no option pair.\nDid you mean pairs?"),
    ],
)  # fmt: skip
def test_a_wrong_keyword_names_the_nearest_one(call, message: str) -> None:
    with pytest.raises(dpo_cache.UnknownOptionError) as caught:
        call()
    assert str(caught.value) == message
    assert isinstance(caught.value, (dpo_cache.OptionError, TypeError, ValueError))


# -- reprs ---------------------------------------------------------------------------------------------


def test_reprs_are_one_short_line(cache: str, tmp_path: Path, model_folder: str) -> None:
    opened = dpo_cache.open_cache(cache)
    pairs = opened.pairs("pairs")
    scored = pairs[0]
    completion = dpo_cache.Completion(np.zeros(3, np.uint32), np.zeros(4, np.uint32))
    assert repr(completion) == "<Completion: 4 tokens after a prompt of 3>"
    assert repr(dpo_cache.Pair(5, completion, completion)) == (
        "<Pair of row 5: 4 chosen and 4 rejected tokens after a prompt of 3>"
    )
    score = dpo_cache.Score(np.full(4, -0.5, np.float32))
    assert repr(score) == "<Score: -2.0000 nats, 4 tokens>"
    assert repr(dpo_cache.Score(np.zeros(0, np.float32), -1.5)) == "<Score: -1.5000 nats, an imported sum>"
    assert repr(opened) == f"<Cache {cache}>"
    trained = dpo_cache.train(cache, tmp_path / "run", pairs="pairs", **FAST)
    shown = [
        opened, pairs, scored, scored.pair, scored.pair.chosen, scored.ref_chosen, trained,
        dpo_cache.precompute(model_folder, Path(cache).with_name("pairs.jsonl"), cache),
        dpo_cache.evaluate(cache, "heldout", f"{trained.output}/model"),
        dpo_cache.verify(cache), dpo_cache.merge(cache, tmp_path / "all"),
        dpo_cache.export_pairs(cache, "pairs", tmp_path / "pairs.parquet"),
        dpo_cache.import_pairs(tmp_path / "new", tmp_path / "pairs.parquet", reference="elsewhere"),
        next(dpo_cache.training_batches(pairs, 4)),
    ]  # fmt: skip
    for value in shown:
        assert repr(value).startswith("<" + type(value).__name__), value
        assert "\n" not in repr(value) and len(repr(value).replace(str(tmp_path), "")) < 160, value


# -- silence and progress ------------------------------------------------------------------------------

SCRIPT = """
import dpo_cache
{before}
report = dpo_cache.precompute({model!r}, {data!r}, "cache", name="pairs"{progress})
run = dpo_cache.train("cache", "run", pairs="pairs", batch_size=4, max_steps=1, eval_every=100,
    eval_fraction=0.4, step_zero="warn"{progress})
judged = dpo_cache.evaluate("cache", "pairs", "run/model"{progress})
assert any("step zero" in remark for remark in run.remarks), run.remarks
assert any("largest gap" in remark for remark in judged.remarks), judged.remarks
"""


def test_a_plain_script_writes_nothing_and_reports_have_the_remarks(
    tmp_path: Path, model_folder: str, data_file: str
) -> None:
    script = SCRIPT.format(model=model_folder, data=data_file, before="", progress="")
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run(  # in a fresh interpreter: tqdm reads its variable when it is imported
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_progress_shows_what_the_command_line_shows(
    tmp_path: Path, model_folder: str, data_file: str
) -> None:
    before = "import dpo_cache.progress; dpo_cache.progress.QUIET_SECONDS = 0"
    script = SCRIPT.format(model=model_folder, data=data_file, before=before, progress=", progress=True")
    done = programs.run(script=script, cwd=tmp_path)
    assert (done.code, done.out) == (0, ""), done.err
    for pattern in (
        r"^scoring  \d+%  .*[\d,]+ tokens/s  ",
        r"^training  step 1/1  loss ",
        r"^eval at step 0: loss 0\.693",
        r"^step zero: largest gap ",
        r"^evaluating +\d+%  ",
    ):
        assert re.search(pattern, done.err, re.M), (pattern, done.err)


def test_remarks_reach_configured_logging_and_the_log_function(
    cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dpo_cache"):
        report = dpo_cache.train(cache, tmp_path / "one", pairs="pairs", **FAST)
    assert report.remarks == [record.message for record in caplog.records if record.name == "dpo_cache"] != []
    caplog.clear()
    seen: list[str] = []
    again = dpo_cache.train(cache, tmp_path / "two", pairs="pairs", log=seen.append, **FAST)
    assert again.remarks == seen != [] and not caplog.records


def test_progress_leaves_the_callbacks_of_the_caller(
    cache: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    metrics: list[dict] = []
    report = dpo_cache.train(
        cache, tmp_path / "run", pairs="pairs", on_metrics=metrics.append, progress=True, **FAST
    )
    shown = capfd.readouterr()
    assert [line["step"] for line in metrics] == [1, 2]
    assert shown.out == "" and all(remark in shown.err for remark in report.remarks)


# -- a loop of one's own -------------------------------------------------------------------------------


def test_the_loop_in_examples_starts_at_ln_2_and_learns(
    cache: str, model_folder: str, own_loop: ModuleType
) -> None:
    policy = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    pairs = dpo_cache.open_cache(cache).pairs("pairs")
    losses = list(own_loop.train(policy, pairs, lr=1e-3, batch_size=3, epochs=4))
    assert len(losses) == 12
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])


def test_the_loop_in_examples_is_a_program_of_about_30_lines(
    cache: str, model_folder: str, tmp_path: Path
) -> None:
    script = ROOT / "examples" / "own_loop.py"
    body = [line for line in script.read_text().split('"""', 2)[2].splitlines() if line.strip()]
    assert len(body) <= 32
    done = programs.run(model_folder, cache, "pairs", script=script.read_text(), cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == "step 0: loss 0.6931"
    AutoModelForCausalLM.from_pretrained(tmp_path / "policy")


# -- a loaded model ------------------------------------------------------------------------------------


def test_a_loaded_model_is_trained_in_place_to_the_same_weights(
    cache: str, model_folder: str, tmp_path: Path
) -> None:
    options = {"pairs": "pairs", "lr": 1e-3, **FAST}
    by_path = dpo_cache.train(cache, tmp_path / "path", model=model_folder, **options)
    policy = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()
    attention, forwards = policy.config._attn_implementation, [module.forward for module in policy.modules()]
    in_place = dpo_cache.train(
        cache,
        tmp_path / "place",
        model=policy,
        tokenizer=AutoTokenizer.from_pretrained(model_folder),
        **options,
    )
    assert in_place.step_zero_gap is not None and in_place.step_zero_gap == by_path.step_zero_gap
    assert any("the policy is the reference" in remark for remark in in_place.remarks)
    saved = AutoModelForCausalLM.from_pretrained(by_path.model, dtype=torch.float32).state_dict()
    again = AutoModelForCausalLM.from_pretrained(in_place.model, dtype=torch.float32).state_dict()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, saved[name]) and torch.equal(tensor, again[name]), name
    AutoTokenizer.from_pretrained(in_place.model)
    assert policy.training and policy.config._attn_implementation == attention
    assert [module.forward for module in policy.modules()] == forwards
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in policy.modules())


def test_a_loaded_model_that_was_changed_does_not_count_as_the_reference(
    cache: str, model_folder: str, tmp_path: Path
) -> None:
    policy = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        policy.lm_head.weight[0, 0] += 1.0
    report = dpo_cache.train(cache, tmp_path / "run", model=policy, pairs="pairs", **FAST)
    assert not any("the policy is the reference" in remark for remark in report.remarks)
    assert any("weights" in remark for remark in report.remarks)


def test_a_model_that_was_loaded_with_fewer_bits_does_not_count_as_the_reference(
    cache: str, model_folder: str, tmp_path: Path
) -> None:
    policy = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    report = dpo_cache.train(cache, tmp_path / "run", model=policy, pairs="pairs", precision="fp32", **FAST)
    assert not any("the policy is the reference" in remark for remark in report.remarks)
    assert policy.dtype == torch.float32


def test_an_adapter_over_a_loaded_model(cache: str, model_folder: str, tmp_path: Path) -> None:
    options = {"pairs": "pairs", "lora_r": 2, "lr": 1e-3, **FAST}
    by_path = dpo_cache.train(cache, tmp_path / "path", model=model_folder, **options)
    policy = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    in_place = dpo_cache.train(cache, tmp_path / "place", model=policy, **options)
    assert in_place.resolved["base_weights"] == by_path.resolved["base_weights"]
    assert in_place.last and by_path.last and in_place.last["loss"] == by_path.last["loss"]
    assert any("lora_" in name for name, _ in policy.named_parameters())


@pytest.mark.parametrize("adapter", [{}, {"lora_r": 2}])
def test_a_loaded_model_resumes_to_the_same_weights(
    cache: str, model_folder: str, tmp_path: Path, adapter: dict
) -> None:
    options = {**FAST, "pairs": "pairs", "lr": 1e-3, "save_every": 1, **adapter}

    def load() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)

    whole = load()
    dpo_cache.train(cache, tmp_path / "whole", model=whole, **options)
    stopped = dpo_cache.train(cache, tmp_path / "parts", model=load(), should_stop=lambda: True, **options)
    assert not stopped.finished
    resumed = load()
    dpo_cache.train(cache, tmp_path / "parts", model=resumed, resume=True, **options)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_what_cannot_be_trained_is_refused(cache: str, model_folder: str, tmp_path: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(model_folder)
    with pytest.raises(dpo_cache.OptionError, match="^a Linear cannot be trained"):
        dpo_cache.train(cache, tmp_path / "run", model=torch.nn.Linear(2, 2), pairs="pairs")
    with pytest.raises(dpo_cache.OptionError, match="^tokenizer is used only with a model"):
        dpo_cache.train(
            cache, tmp_path / "run", tokenizer=AutoTokenizer.from_pretrained(model_folder), pairs="pairs"
        )
    with pytest.raises(dpo_cache.OptionError, match="^quantize 4bit: the model is in memory already"):
        dpo_cache.train(cache, tmp_path / "run", model=policy, pairs="pairs", quantize="4bit", lora_r=2)
    assert not (tmp_path / "run").exists()


# -- caches --------------------------------------------------------------------------------------------


def test_verify_repairs_and_scores_again(cache: str, model_folder: str, tmp_path: Path) -> None:
    dpo_cache.merge(cache, tmp_path / "copy")
    report = dpo_cache.verify(tmp_path / "copy", rescore=3, model=model_folder)
    assert report.is_whole and report.repair is None and [entry.agrees for entry in report.rescored] == [True]
    shard = next((tmp_path / "copy" / "references").rglob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert not dpo_cache.verify(tmp_path / "copy").is_whole and shard.exists()
    repaired = dpo_cache.verify(tmp_path / "copy", repair=True)
    assert repaired.repair.moved and not shard.exists()
    assert dpo_cache.verify(tmp_path / "copy").is_whole


def test_an_open_cache_is_a_location(cache: str) -> None:
    assert dpo_cache.verify(dpo_cache.open_cache(cache)).pairs == 18


def test_compact_gives_an_entry_for_each_reference(cache: str, tmp_path: Path) -> None:
    dpo_cache.merge(cache, tmp_path / "copy")
    (entry,) = dpo_cache.compact(tmp_path / "copy")
    assert (entry.shards_before, entry.shards_after) == (2, 1)
    assert dpo_cache.compact(tmp_path / "copy", reference=entry.reference[:8])[0].shards_before == 1


# -- the docs ------------------------------------------------------------------------------------------


def test_the_docs_show_every_function() -> None:
    used = set(re.findall(r"dpo_cache\.(\w+)", (ROOT / "docs" / "python.md").read_text()))
    functions = {name for name in dpo_cache.__all__ if inspect.isfunction(getattr(dpo_cache, name))}
    assert functions <= used


def test_the_docs_name_every_field_of_a_batch() -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    assert all(f"`{entry.name}`" in text for entry in fields(dpo_cache.TrainingBatch))


def test_dir_shows_only_public_names() -> None:
    shown = dir(dpo_cache)
    assert {name for name in shown if not name.startswith("__")} == set(dpo_cache.__all__)
    assert {"__version__", "__doc__"} <= set(shown)


def test_a_loaded_model_in_float64_is_refused(tmp_path: Path) -> None:
    model = make_llama().double()
    with pytest.raises(
        dpo_cache.ModelError, match="the model's weights are float64: log-probs are scored in"
    ):
        dpo_cache.precompute(model, chat_rows(2), tmp_path / "cache", name="a", tokenizer=make_tokenizer())
    assert not (tmp_path / "cache").exists()


def test_unreadable_data_is_reported_once(tmp_path: Path, model_folder: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": \n{not json}\n')
    script = (
        "import sys, dpo_cache\n"
        "try:\n    dpo_cache.precompute(*sys.argv[1:])\n"
        "except dpo_cache.DataError as error:\n    print(error)\n"
    )
    words = [model_folder, str(tmp_path / "bad.jsonl"), str(tmp_path / "cache")]
    done = programs.run(*words, script=script)
    assert "bad.jsonl, line 2: not readable (" in done.out and done.err == "", done.err
