"""When weights are streamed, from where, and how often that reads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from dpo_cache.errors import OptionError
from dpo_cache.lm import streaming
from dpo_cache.lm.layerwise.meter import READINGS, WINDOW_S
from dpo_cache.lm.model.load import load_config
from dpo_cache.lm.streaming import Streaming, choose_streaming, count_readings
from tests.conftest import make_llama

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VOCAB, NUM_VALUES = 264 * 32, sum(one.numel() for one in make_llama().parameters())
IN_LAYERS = NUM_VALUES - 2 * VOCAB  # and the last norm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("model")
    make_llama().to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def choose(
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    option: str = "auto",
    device: torch.device = CPU,
    *,
    free: int = 10**9,
    host: int = 10**9,
    config: PreTrainedConfig | None = None,
    **options: Any,
) -> Streaming | None:
    monkeypatch.setattr(streaming, "free_bytes", lambda _: free)
    monkeypatch.setattr(streaming, "free_host_bytes", lambda: host)
    options = {"dtype": torch.float32, "revision": None, **options}
    return choose_streaming(option, folder, config or load_config(folder), device=device, **options)


def test_auto_compares_the_weights_as_they_are_loaded_with_the_free_memory(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * NUM_VALUES
    assert choose(monkeypatch, folder, free=size * 2) is None
    found = choose(monkeypatch, folder, free=size)
    assert found is not None and not found.is_required and found.resident_bytes == size
    assert found.read_bytes == 2 * IN_LAYERS and found.num_weights == IN_LAYERS  # stored in 16 bits
    assert choose(monkeypatch, folder, free=size, dtype=torch.bfloat16) is None
    assert choose(monkeypatch, folder, "off", free=0) is None
    found = choose(monkeypatch, folder, "on")
    assert found is not None and found.is_required


def test_a_gpu_reads_from_the_host_if_the_weights_fit_there(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * NUM_VALUES
    found = choose(monkeypatch, folder, device=CUDA, free=1000, host=2 * size)
    assert found is not None and (found.place, found.read_bytes) == ("host", 4 * IN_LAYERS)
    assert found.window_bytes == size // 4 and found.embedding == "host"
    found = choose(monkeypatch, folder, device=CUDA, free=1000, host=size)
    assert found is not None and (found.place, found.read_bytes) == ("disk", 2 * IN_LAYERS)
    assert found.window_bytes == size // 4 and found.embedding == "device"


def test_quantized_weights_are_small_and_stay_in_host_memory(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = sum(one.numel() for one in make_llama().model.layers.parameters() if one.ndim == 2)
    size = 4 * (NUM_VALUES - matrices) + 0.53 * matrices
    found = choose(monkeypatch, folder, device=CUDA, free=1000, quantize="4bit")
    assert found is not None and found.place == "host"
    assert found.resident_bytes == pytest.approx(size, rel=1e-3)
    assert choose(monkeypatch, folder, free=1000, quantize="4bit") is None
    saved = load_config(folder)
    saved.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(
        OptionError, match="quantized weights are kept in host memory; cpu has no memory apart from it"
    ):
        choose(monkeypatch, folder, "on", config=saved)
    found = choose(monkeypatch, folder, device=CUDA, free=1000, config=saved)
    assert found is not None and found.resident_bytes == 2 * NUM_VALUES  # as it is stored


@pytest.mark.parametrize(
    ("tokens_per_s", "bytes_per_s", "window_bytes", "num_windows"),
    [
        (100, 1e9, 10**12, 10),  # by time: 30,000 tokens
        (100, 1e9, 10_000 * 192, 30),  # by memory: 10,000 tokens
        (100, 1e9 / 60, 10**12, 5),  # a reading takes a minute
    ],
)
def test_readings_are_those_of_the_windows_the_self_check_and_the_audit(
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    tokens_per_s: float,
    bytes_per_s: float,
    window_bytes: int,
    num_windows: int,
) -> None:
    found = Streaming("disk", False, 10**9, 0, 0, window_bytes, 192, 10**6, (Path(folder),))
    products = tokens_per_s * 2 * found.num_weights / streaming.EFFICIENCY
    monkeypatch.setattr(streaming, "_products_per_s", lambda *_: products)
    monkeypatch.setattr(streaming, "_bytes_per_s", lambda *_: bytes_per_s)
    assert (WINDOW_S, READINGS) == (300, 10)
    options: dict[str, Any] = {"num_tokens": 300_000, "num_completions": 2000}
    readings = count_readings(found, CPU, torch.float32, audit_interval=None, **options)
    assert readings.count == 3 + num_windows and readings.num_bytes == readings.count * 10**9
    assert readings.elapsed_s == pytest.approx(readings.num_bytes / bytes_per_s)
    readings = count_readings(found, CPU, torch.float32, audit_interval=500, **options)
    assert readings.count == 3 + num_windows + 2 + 4
    options["num_tokens"] = 0
    assert count_readings(found, CPU, torch.float32, audit_interval=500, **options).count == 0


def test_the_speeds_are_measured(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = choose(monkeypatch, folder, "on")
    assert found is not None
    readings = count_readings(
        found, CPU, torch.float32, num_tokens=1000, num_completions=10, audit_interval=500
    )
    assert readings.count == 3 + 1 + 2 and readings.bytes_per_s > 0
    assert str(readings).startswith("about 6 times from disk, ") and " in all: 0 s at " in str(readings)
