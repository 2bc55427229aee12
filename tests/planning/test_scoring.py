"""The counted memory of scoring is that of torch's allocator."""

import pytest
import torch

from dpo_cache.lm.forest.attention import use_forest_attention
from dpo_cache.lm.forest.stream import Stream
from dpo_cache.lm.scoring import ChunkRunner
from dpo_cache.planning.live_bytes import allocated_peak
from dpo_cache.planning.parts import Method
from dpo_cache.planning.placed import measure_model
from dpo_cache.planning.scoring import ScoringCounts
from tests.conftest import make_llama
from tests.planning.test_footprint import pairs
from tests.planning.test_plain_step import WIDE

METHOD = Method("fp32", optimizer="none")


def counts(layers: int) -> ScoringCounts:
    config = make_llama(**{**WIDE, "num_hidden_layers": layers}).config
    return ScoringCounts(
        config, measure_model(config, METHOD), pairs(12, 300, 100), torch.float32, device_type="cpu"
    )


@pytest.mark.rotating(2)
@pytest.mark.parametrize("tokens", [1024, 2000])
def test_counted_from_small_chunks_is_what_is_allocated(tokens: int) -> None:
    model, completions = make_llama(**{**WIDE, "num_hidden_layers": 4}), pairs(12, 300, 100)
    use_forest_attention(model)
    stream = Stream(completions)

    @torch.no_grad()
    def run() -> None:
        runner = ChunkRunner(model, stream, "segments")
        for chunk in stream.chunks(lambda: tokens):
            runner.run(chunk)

    counted = counts(4).resident(tokens)
    assert counted.activations == pytest.approx(allocated_peak(run), rel=0.08)
    assert counted.weights == sum(parameter.nbytes for parameter in model.parameters())


def test_streamed_weights_take_as_much_for_any_number_of_layers() -> None:
    few, many = counts(3), counts(9)
    assert few.streamed(1000) == many.streamed(1000)
    assert many.resident(1000).total > few.resident(1000).total > few.streamed(1000).total
