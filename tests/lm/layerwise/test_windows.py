"""What a window holds, in which order it runs, and how often the weights are read."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dpo_cache.lm.layerwise import meter
from dpo_cache.lm.layerwise.meter import Meter
from dpo_cache.lm.layerwise.record import find_layers
from dpo_cache.lm.layerwise.windows import LayerMajor, Pass
from tests.conftest import make_llama

CPU = torch.device("cpu")
STATE_BYTES = 4 * 32  # of a token of `make_llama`
ROTARY_BYTES = 2 * 4 * 8 * 8  # of the two tables of a pass of 8 tokens


class LoggedWeights:
    """Notes what is opened, and what is fetched meanwhile."""

    def __init__(self) -> None:
        self.log: list[str] = []

    @contextmanager
    def use(self, index: int, *, then: int | None = None) -> Iterator[None]:
        self.log.append(f"{index}>{'-' if then is None else then}")
        yield

    @contextmanager
    def use_bottom(self) -> Iterator[None]:
        self.log.append("bottom")
        yield
        self.log.append("/bottom")

    @contextmanager
    def use_top(self) -> Iterator[None]:
        self.log.append("top")
        yield
        self.log.append("/top")


def make_passes(model: torch.nn.Module, weights: LoggedWeights, num_passes: int) -> Iterator[Pass]:
    """Rows of 8 tokens, the second of them without anything to run."""
    for number in range(num_passes):
        arguments = {"input_ids": (torch.arange(8) + number)[None], "use_cache": False}

        def read(outputs: object, number: int = number) -> tuple[int, object]:
            weights.log.append(f"read {number}")
            return number, None if outputs is None else outputs[0]  # type: ignore[index]

        is_empty = number == 1
        yield Pass(None if is_empty else arguments, read, 0 if is_empty else 8)


def make(weights: LoggedWeights, **options: int) -> tuple[torch.nn.Module, LayerMajor]:
    model = make_llama()
    with torch.no_grad():
        layers = find_layers(model, input_ids=torch.arange(4)[None], use_cache=False)
    return model.model, LayerMajor(layers, weights, CPU, **{"window_bytes": 2**30, **options})


def windows(log: list[str]) -> list[list[int]]:
    """The passes that each window has read."""
    found: list[list[int]] = []
    for entry in log:
        if entry == "top":
            found.append([])
        elif entry.startswith("read"):
            found[-1].append(int(entry.split()[1]))
    return found


def test_a_window_passes_a_layer_after_the_other_and_the_next_one_is_fetched_meanwhile() -> None:
    weights = LoggedWeights()
    decoder, run = make(weights, window_tokens=16)
    done = list(run.run(make_passes(decoder, weights, 4)))
    assert weights.log == [
        "bottom", "/bottom", "0>1", "1>0", "top", "read 1", "read 0", "read 2", "/top",
        "bottom", "/bottom", "0>1", "1>-", "top", "read 3", "/top",
    ]  # fmt: skip
    assert [(one.place, one.num_tokens, one.ends_window) for one in done] == [
        (None, 8, False), (None, 8, False), (0, 0, False), (1, 0, False), (2, 0, True),
        (None, 4, False), (None, 4, False), (3, 0, True),
    ]  # fmt: skip
    with torch.no_grad():
        for one in done:
            if one.place is not None and one.place != 1:
                number, hidden = one.result
                expected = decoder(input_ids=(torch.arange(8) + number)[None], use_cache=False)[0]
                assert number == one.place and torch.equal(hidden, expected)


@pytest.mark.parametrize(("window_bytes", "sizes"), [(2**30, [8, 1]), (0, [1] * 9), (None, [3, 3, 3])])
def test_memory_and_the_unknown_speed_bound_a_window(
    window_bytes: int | None, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = LoggedWeights()
    decoder, run = make(weights)
    per_pass = 8 * STATE_BYTES + ROTARY_BYTES
    run.window_bytes = 3 * per_pass + per_pass // 2 if window_bytes is None else window_bytes
    monkeypatch.setattr(meter, "FIRST_TOKENS", 64)
    run.meter = Meter(lambda *_, **__: 0.0)  # no time passes, so no speed becomes known
    passes = (one for one in make_passes(decoder, weights, 10) if one.arguments)
    list(run.run(passes))
    assert [len(one) for one in windows(weights.log)] == sizes


def test_what_the_layers_are_given_is_bounded_by_the_memory_of_the_device() -> None:
    weights = LoggedWeights()
    decoder, run = make(weights, device_bytes=int(2 * 3.5 * ROTARY_BYTES))
    list(run.run(one for one in make_passes(decoder, weights, 8) if one.arguments))
    assert [len(one) for one in windows(weights.log)] == [3, 3, 1]


def test_the_speed_bounds_a_window_once_it_is_known() -> None:
    weights = LoggedWeights()
    decoder, run = make(weights)
    run.meter.tokens_per_s = 16 / run.meter.window_s
    list(run.run(one for one in make_passes(decoder, weights, 6) if one.arguments))
    assert windows(weights.log)[0] == [0, 2]
