"""`dpo-cache plan` on the command line: its tables, its JSON, its commands and its errors."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dpo_cache
from dpo_cache.cli.plan import _cards
from dpo_cache.errors import OptionError
from dpo_cache.options.plan import PlanOptions, size_in_bytes
from dpo_cache.planning import plan as plan_module
from dpo_cache.planning.report import PlanReport
from tests.cli.test_commands import run  # noqa: F401  (a fixture)
from tests.conftest import chat_rows, write_rows

SMALL = ("--device", "cpu", "--tflops", 1, "--lora-r", 2, "--quantize", "8bit", "--memory", "fast")


def without_remarks(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name != "remarks"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> str:
    folder = tmp_path_factory.mktemp("plan")
    data = write_rows(folder / "pairs.jsonl", chat_rows(12))
    dpo_cache.precompute(model_folder, data, folder / "cache")
    return str(folder / "cache")


@pytest.mark.slow
def test_a_plan_for_a_gpu(run, cache: str, model_folder: str) -> None:
    done = run(
        "plan",
        cache,
        "--model",
        model_folder,
        "--gpu",
        "8GiB",
        "--tflops",
        10,
        "--precision",
        "bf16",
        "--verbose",
    )
    assert done.code == 0, done.err
    for text in (
        f"{model_folder}: a plan for cuda",
        f"pairs/train of {cache}",
        "\nprecompute\n",
        "\ntrain, from the fastest down\n",
        "\ntrain, on the device by part\n",
        "\ntrain, on the host by part\n",
        "hidden on PCIe 4",
        "500.0 MB for the CUDA context",
        f"  dpo-cache train --model {model_folder} --cache {cache} --output RUN --precision bf16 --memory small",
    ):
        assert text in done.out, text
    methods = [line.split("  ")[0] for line in done.out.splitlines() if "8GiB" in line]
    assert methods.count("full") == 3 and methods.count("LoRA r=16") == 3
    assert methods.count("LoRA r=16 on 4 bits") == 3
    assert not (Path(cache).parent / "RUN").exists()


def test_json_is_the_report(run, cache: str, model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reports, plan = [], plan_module.plan

    def noting(*arguments: Any, **options: Any) -> PlanReport:
        assert {name: options[name] for name in expected} == expected
        reports.append(plan(*arguments, **options))
        return reports[-1]

    expected = {"device": "cpu", "tflops": 1.0, "lora_r": 2, "quantize": "8bit", "memory": "fast"}
    monkeypatch.setattr(plan_module, "plan", noting)
    done = run("plan", cache, "--model", model_folder, *SMALL, "--json")
    (report,) = reports
    assert without_remarks(json.loads(done.out)) == json.loads(json.dumps(without_remarks(asdict(report))))
    (way,) = report.train
    assert (way.method, way.memory, way.gradient_checkpointing) == ("LoRA r=2 on 8 bits", "fast", "cheap")
    assert way.device_bytes == way.device.total and way.transfers is None
    assert report.data.num_pairs == 12 and report.num_steps == 1
    assert repr(report) == f"<PlanReport of {model_folder}: 1 of 1 ways to train fit>"


def test_a_plan_is_short_by_default(run, cache: str, model_folder: str) -> None:
    done = run("plan", cache, "--model", model_folder, *SMALL)
    tables = done.out.partition("\nprecompute\n")[2].partition("\ncommands\n")[0]
    assert done.code == 0 and max(map(len, tables.splitlines())) <= 80
    assert "by part\n" not in done.out and "Assumed: " not in done.out and "checkpoint" not in done.out
    assert "--verbose adds memory by part, " in done.out
    for text in ("\nprecompute\n", "\ntrain, from the fastest down\n", "\ncommands\n"):
        assert text in done.out


def test_cards_are_named_by_the_smallest() -> None:
    report, way = SimpleNamespace(cards=["8GiB", "16GiB", "24GiB"]), SimpleNamespace
    assert _cards(report, way(fits=["16GiB", "24GiB"])) == "from 16GiB"  # type: ignore[arg-type]
    assert _cards(report, way(fits=["24GiB"])) == "24GiB"  # type: ignore[arg-type]
    assert _cards(report, way(fits=["8GiB", "16GiB"])) == "8GiB, 16GiB"  # type: ignore[arg-type]
    assert _cards(report, way(fits=[])) == "none"  # type: ignore[arg-type]


def test_nothing_fits(run, model_folder: str) -> None:
    done = run(
        "plan", "--model", model_folder, "--gpu", "100MiB", "--tflops", 1, "--lora-r", 2, "--quantize", "8bit"
    )
    assert done.code == 0, done.err
    assert "No way to train fits: the smallest needs " in done.out
    assert "dpo-cache train --model" not in done.out


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("24", 24 * 2**30),
        ("24GiB", 24 * 2**30),
        ("24 gib", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24g", 24 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("500MB", 5 * 10**8),
        ("2000000000B", 2 * 10**9),
    ],
)
def test_sizes(value: str, expected: int) -> None:
    assert size_in_bytes("gpu", value) == expected
    assert PlanOptions(model="m", gpu=value).gpu_bytes() == expected


WRONG = {
    "no size": ({"gpu": "nonsense"}, "`gpu` nonsense: expected a size such as 24GiB or 24GB."),
    "below 0": ({"gpu": "-1"}, "`gpu` -1: expected a size such as 24GiB or 24GB."),
    "nothing": ({"gpu": "0"}, "`gpu` 0: expected a size from 1MiB to 1024TiB, such as 24GiB."),
    "two units": ({"ram": "24GiBB"}, "`ram` 24GiBB: expected a size such as 24GiB or 24GB."),
    "too much": ({"ram": "9999999"}, "`ram` 9999999: expected a size from 1MiB to 1024TiB, such as 24GiB."),
    "speed": ({"tflops": 0.0}, "`tflops` 0.0: expected a number above 0."),
    "link": ({"link_gbs": -1.0}, "`link_gbs` -1.0: expected a number above 0."),
    "both": (
        {"dataset": "d", "cache": "c", "pairs": "p"},
        "`dataset` and `cache`: the lengths are those of one of them.\nGive `dataset`, or `cache` and `pairs`.",
    ),
    "pairs of what": ({"pairs": "p"}, "`pairs` p: the cache that has it is not given.\nGive `cache`."),
    "no data": ({"max_length": 512}, "`max_length` 512 is used only with `dataset`."),
    "no data, several": ({"split": ("a", "b")}, "`split` a b is used only with `dataset`."),
    "a cpu": ({"gpu": "8GiB", "device": "cpu"}, "`gpu` 8GiB and `device` cpu: there is no GPU to plan for.\nGive `ram`."),
    "targets": ({"lora_targets": "q_proj"}, "`lora_targets` q_proj is used only with `lora_r`."),
    "rounding": (
        {"rounding": "nearest"},
        "`rounding` nearest is used only with `precision` bf16, which updates in bf16.",
    ),
    "device": ({"device": "tpu"}, "`device` tpu: expected one of cuda, mps, cpu."),
    "memory": ({"memory": "tiny"}, "`memory` tiny: expected one of auto, fast, small, least."),
    "tokens": ({"budget_tokens": "-3"}, "`budget_tokens` -3: expected auto or a positive number."),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_options_that_make_no_sense(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(OptionError) as caught:
        PlanOptions(model="m", **options)
    assert str(caught.value) == message


def test_a_model_that_cannot_be_planned_for(run, tmp_path: Path, model_folder: str) -> None:
    config = json.loads(Path(model_folder, "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    done = run("plan", "--model", tmp_path)
    assert (done.code, done.err.splitlines()) == (
        1,
        [
            f"error: {tmp_path}: its weights were saved quantized, in a format whose memory is not known.",
            "Give the model that it was made from, with --quantize.",
        ],
    )
