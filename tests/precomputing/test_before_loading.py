"""What is wrong with options, machine or packages is found before the data is read and a model is loaded."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

import dpo_cache
from dpo_cache.errors import DpoCacheError
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.precomputing import reference, run
from tests.conftest import make_llama, make_tokenizer


class WentOn(Exception):
    """Raised where the data would be read, or a model loaded."""


@pytest.fixture(autouse=True)
def stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise WentOn

    monkeypatch.setattr(run, "read_splits", refuse)
    monkeypatch.setattr(reference, "open_reference", refuse)


def precompute(model: str, data_file: str, tmp_path: Path, **options: object) -> None:
    dpo_cache.precompute(model, data_file, tmp_path / "cache", **options)


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    ("options", "absent", "message"),
    [
        ({"quantize": "4bit"}, "bitsandbytes", "`quantize` 4bit needs bitsandbytes, which is not installed"),
        ({"ray": "local"}, "ray", "`ray` needs Ray, which is not installed.\nInstall it with `pip install"),
        pytest.param(
            {"device": "cuda"}, "", "`device` cuda: not available here.\nAvailable: cpu", marks=NO_GPU
        ),
        pytest.param(
            {"device": "cuda", "num_workers": 2}, "", "`device` cuda: not available here", marks=NO_GPU
        ),
    ],
)
def test_options_that_this_machine_does_not_serve(
    model_folder: str,
    data_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict,
    absent: str,
    message: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == absent else find(name, *rest)
    )
    with pytest.raises(DpoCacheError, match=message):
        precompute(model_folder, data_file, tmp_path, **options)
    assert not (tmp_path / "cache").exists()


def test_more_workers_than_devices(
    model_folder: str, data_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DpoCacheError, match="`num_workers` 3: there are 2 cuda devices here"):
        precompute(model_folder, data_file, tmp_path, num_workers=3, device="cuda")


def test_a_quantized_checkpoint_without_the_package_that_reads_it(
    model_folder: str, data_file: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        DpoCacheError, match="its weights are quantized .gptq., and optimum and gptqmodel are not"
    ):
        precompute(str(folder), data_file, tmp_path)


def test_weights_that_are_not_spread(model_folder: str, data_file: str, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    base = make_llama().from_pretrained(tmp_path / "base")
    adapted = add_adapter(base, lora_config(2, None, "q_proj"), seed=0)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        DpoCacheError, match="`device_map` auto spreads plain weights, not an adapter on its base"
    ):
        precompute(str(tmp_path / "adapter"), data_file, tmp_path, device_map="auto")
    pytest.importorskip("bitsandbytes")
    with pytest.raises(DpoCacheError, match="`device_map` auto spreads plain weights, not quantized ones"):
        precompute(model_folder, data_file, tmp_path, device_map="auto", quantize="4bit")


def test_options_that_are_right_go_on(model_folder: str, data_file: str, tmp_path: Path) -> None:
    for options in ({}, {"device": "cpu", "num_workers": 2}, {"device_map": "auto"}):
        with pytest.raises(WentOn):
            precompute(model_folder, data_file, tmp_path, **options)
