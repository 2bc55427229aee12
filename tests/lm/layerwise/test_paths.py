"""One layer's keys and values at a time; between windows, those of all layers as far as they are continued."""

import pytest
import torch

from dpo_cache.lm.layerwise.paths import CarriedPaths

DEPTH = 6


@pytest.mark.parametrize("shape", [(1, 2, DEPTH, 3), (DEPTH, 2, 3)])
def test_only_the_front_is_kept_for_the_next_window(shape: tuple[int, ...]) -> None:
    paths, dim = CarriedPaths(torch.device("cpu")), shape.index(DEPTH)
    shared = paths.current  # plans hold this object
    written = {}
    for layer in range(2):
        with paths.of(layer, 4):
            assert not shared
            keys = torch.arange(36.0).view(shape) + 100 * layer
            written[layer] = keys.narrow(dim, 0, 4).clone()
            shared[7] = keys, -keys
        assert not shared
    for layer in range(2):
        with paths.of(layer, 0):
            keys, values = shared[7]
            assert keys.shape == shape and torch.equal(keys.narrow(dim, 0, 4), written[layer])
            assert torch.equal(values, -keys) and not keys.narrow(dim, 4, 2).any()
    with paths.of(0, 0):
        assert not shared, "the path of the window before was not continued"
