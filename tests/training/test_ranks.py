"""The single rank of an ordinary run; several are in tests/scale."""

import pytest
import torch

import dpo_cache
from dpo_cache.errors import DataError, OptionError
from dpo_cache.training.ranks import Ranks


def test_one_rank_exchanges_with_itself() -> None:
    ranks, tensor = Ranks(), torch.ones(2)
    ranks.add_up([tensor])
    assert (ranks.gather(3), ranks.share("a"), ranks.any(0), ranks.any([1])) == ([3], "a", False, True)
    assert tensor.tolist() == [1, 1] and ranks.collect(tensor) == [tensor] and ranks.on_main(lambda: 5) == 5


def test_an_error_of_one_rank_is_raised_as_it_is() -> None:
    error = DataError("no")

    def fail() -> None:
        raise error

    with pytest.raises(DataError) as found:
        Ranks().on_main(fail)
    assert found.value is error


def test_a_function_starts_no_processes() -> None:
    with pytest.raises(OptionError) as error:
        dpo_cache.train("cache", "run", launch=2)
    assert str(error.value) == (
        "`launch` 2: the command line starts processes, a function does not.\n"
        "Start the program with `accelerate launch` or torchrun, and leave `launch` out."
    )
