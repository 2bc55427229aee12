"""The self-check of a streamed model: the choice of a resident one, for a few readings of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cache.errors import ModelError
from dpo_cache.lm.layerwise.check import find_layer_major
from dpo_cache.lm.layerwise.layer_io import NotLayerMajorError
from dpo_cache.lm.layerwise.windows import LayerMajor
from dpo_cache.lm.model.load import load_model
from dpo_cache.lm.model.load_streamed import load_streamed
from dpo_cache.lm.self_check import choose_attention
from tests.lm.layerwise.test_scoring import make

CPU = torch.device("cpu")


@contextmanager
def streamed(family: str, folder: Path) -> Iterator[tuple[Any, LayerMajor]]:
    make(family).save_pretrained(folder)
    model, weights = load_streamed(str(folder), dtype=torch.float32, device=CPU, weights="disk")
    with weights:
        yield model, find_layer_major(model, weights, 2**30)


@pytest.mark.rotating(2)
@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize(
    ("family", "name", "num_readings"),
    # a plain call, the model's own forward layer by layer; the forest; padded rows
    [("llama", "forest", 3), ("gemma2", "forest", 3), ("bloom", "rows", 3), ("granitemoehybrid", "rows", 4)],
)
def test_the_choice_is_that_of_a_resident_model(
    family: str, name: str, num_readings: int, tmp_path: Path
) -> None:
    with streamed(family, tmp_path) as (model, run):
        found = choose_attention(model, max_length=64, ways=("stream",), layer_major=run)
        assert run.meter.num_readings + 1 == num_readings
    whole = load_model(str(tmp_path), dtype=torch.float32, device=CPU)
    expected = choose_attention(whole, max_length=64, ways=("stream",))
    assert found.name == expected.name == name
    assert (found.max_rows, found.max_tokens) == (expected.max_rows, expected.max_tokens)
    assert found.gap == expected.gap and found.reason == expected.reason


def test_a_row_that_comes_out_otherwise_than_by_a_plain_call_refuses_the_model(tmp_path: Path) -> None:
    with streamed("llama", tmp_path) as (model, run):
        assert run.witness is not None
        completion, logps_T = run.witness
        run.witness = completion, logps_T + 0.01
        with pytest.raises(NotLayerMajorError, match="layer by layer, it differs from plain rows by up to"):
            choose_attention(model, max_length=64, layer_major=run)


def test_a_model_that_is_not_causal_is_refused_as_a_resident_one(tmp_path: Path) -> None:
    with streamed("llama", tmp_path) as (model, run):
        norm = model.model.norm
        real = norm.forward
        norm.forward = lambda states: real(states) + states.mean(1, keepdim=True)
        run.witness = None
        with pytest.raises(ModelError, match="is not causal"):
            choose_attention(model, max_length=64, layer_major=run)
