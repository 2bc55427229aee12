"""Optimizer state and temporary values, compared with what the updater makes."""

import pytest
import torch

from dpo_cache.errors import OptionError
from dpo_cache.planning import optimizer as planned
from dpo_cache.planning.live_bytes import LiveBytes
from dpo_cache.planning.optimizer import optimizer_bytes, stream_bytes, update_bytes
from dpo_cache.training.optim import rounding as rounding_module
from dpo_cache.training.optim import slots, streaming
from dpo_cache.training.optim.optimizers import make_optimizer
from dpo_cache.training.optim.updates import Updater
from tests.training.optim.test_streaming import FakeTransfer

OPTIMIZERS = [name for name in planned.OPTIMIZERS if name != "none" and not name.endswith("paged")]
ROUNDED = ["nearest", "stochastic", "compensated"]


class Sizes(torch.nn.Module):
    """Tensors of fewer and of more values than get 8 bits, in several numbers of dimensions, and of sizes that
    are no multiples of a block."""

    SHAPES: tuple[tuple[int, ...], ...] = (
        *((64, 64), (63, 65), (70, 131), (3, 40, 50)),
        *((2, 3, 5), (64,), (5000,), (1,)),
    )

    def __init__(self, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.ones(shape, dtype=dtype) for shape in shapes)
        self.device = torch.device("cpu")


def updated(
    name: str, precision: str, rounding: str, shapes: tuple[tuple[int, ...], ...] = Sizes.SHAPES
) -> Updater:
    """The optimizer after an update of every parameter."""
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    model = Sizes(torch.bfloat16 if precision == "bf16" else torch.float32, shapes)
    optimizer = make_optimizer(model, name, lr=1e-3, weight_decay=0.1, rounding=rounding)  # type: ignore[arg-type]
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def live_state_bytes(optimizer: Updater) -> int:
    """Bytes of every tensor of an optimizer's state, each storage once."""
    states = [*optimizer._base.state.values(), *({"rest": slot.rest} for slot in optimizer._slots)]
    found = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}.values())


def test_states_by_hand() -> None:
    matrix, bias = torch.nn.Parameter(torch.empty(128, 64)), torch.nn.Parameter(torch.empty(64))
    half, size = torch.nn.Parameter(torch.empty(128, 64, dtype=torch.bfloat16)), 128 * 64
    assert optimizer_bytes([matrix, bias], "adamw") == 8 * (size + 64) + 2 * 4
    assert optimizer_bytes([half], "adamw") == 8 * size + 4
    assert optimizer_bytes([half], "adamw", "compensated") == 10 * size + 4
    assert optimizer_bytes([half], "adamw", None) == 4 * size + 4  # as TRL runs it
    assert optimizer_bytes([half], "adamw-bf16") == optimizer_bytes([matrix], "adamw-bf16") == 4 * size + 4
    tables = 2 * 256 * 4
    assert optimizer_bytes([matrix, bias], "adamw-8bit") == tables + 2 * (size + 4 * 32) + 8 * 64
    assert optimizer_bytes([bias], "adamw-8bit") == 8 * 64
    assert optimizer_bytes([matrix, bias], "adafactor") == 4 * (128 + 64) + 4 * 64 + 2 * 4
    assert optimizer_bytes([matrix, half], "none", "compensated") == 0
    for count in (optimizer_bytes, update_bytes, stream_bytes):
        with pytest.raises(
            OptionError, match=r"optimizer 'sgd': its state is not known\.\nUse one of adamw, "
        ):
            count([matrix], "sgd")


@pytest.mark.rotating(3)
@pytest.mark.parametrize("rounding", ROUNDED)
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_that_an_update_makes_is_counted_to_the_byte(
    name: str, precision: str, rounding: str
) -> None:
    optimizer = updated(name, precision, rounding)
    assert optimizer_bytes(optimizer.parameters, name, rounding) == live_state_bytes(optimizer)


def test_paged_state_takes_as_much() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sizes = list(Sizes(dtype).parameters())
        for name in ("adamw", "adamw-8bit"):
            expected = optimizer_bytes(sizes, name, "compensated")
            assert optimizer_bytes(sizes, f"{name}-paged", "compensated") == expected


@pytest.mark.rotating(3)
@pytest.mark.parametrize("rounding", ROUNDED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw-8bit"])
@pytest.mark.parametrize("slice_values", [512, 2**22])
def test_temporary_values_of_an_update_are_counted(
    name: str, precision: str, rounding: str, slice_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 bits are counted as on a GPU, whose kernels have no temporary values."""
    shapes = ((300, 100), (40, 50))
    optimizer = updated(name, precision, rounding, shapes)
    monkeypatch.setattr(rounding_module, "SLICE", slice_values)
    monkeypatch.setattr(planned, "SLICE", slice_values)
    monkeypatch.setattr(planned, "SLICE_AT_HOME", 4 * slice_values)
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    with LiveBytes() as live:
        optimizer.step()
    counted = update_bytes(optimizer.parameters, name, rounding)
    assert counted == pytest.approx(live.peak, rel=0.03, abs=1500)  # scalars, means of rows and columns
    assert bool(counted) == (precision == "bf16" or name != "adamw")


@pytest.mark.parametrize("rounding", ROUNDED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adafactor"])
def test_buffers_of_a_stream_are_counted_to_the_byte(
    name: str, precision: str, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    for module in (rounding_module, planned):
        monkeypatch.setattr(module, "SLICE", 5120)
    transfer = FakeTransfer()
    model = Sizes(torch.bfloat16 if precision == "bf16" else torch.float32, ((40, 300), (50, 100)))
    optimizer = make_optimizer(
        model,  # type: ignore[arg-type]
        name,
        lr=1e-3,
        weight_decay=0.1,
        rounding=rounding,
        compute_device=torch.device("cpu"),
        transfer=transfer,
    )
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert stream_bytes(optimizer.parameters, name, rounding) == sum(transfer.sizes)
    here, streamed = (
        update_bytes(optimizer.parameters, name, rounding, is_streamed=flag) for flag in (False, True)
    )
    assert 0 <= streamed - sum(transfer.sizes) <= here


def test_sizes_are_those_of_the_updater() -> None:
    assert rounding_module.SLICE == planned.SLICE
    assert rounding_module.SLICE * slots.SLICES_AT_HOME == planned.SLICE_AT_HOME
    assert (streaming.NUM_PAIRS, streaming.ALIGNMENT) == (planned.NUM_BUFFERS, planned.ALIGNMENT)
    assert slots.BLOCK == planned.BLOCK
    sizes = list(Sizes(torch.bfloat16).parameters())
    assert stream_bytes(sizes, "adafactor") == update_bytes(sizes, "adafactor", is_streamed=True) == 0
