"""Updates in slices and on the host: the same bits as at once and at home; and state in bfloat16 that learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_cache.errors import OptionError
from dpo_cache.lm.sharded import LocalShard
from dpo_cache.training.optim import rounding, slots
from dpo_cache.training.optim.optimizers import make_optimizer
from dpo_cache.training.optim.updates import Updater
from tests.training.optim.test_optimizers import OPTIMIZERS, assert_same
from tests.training.optim.test_streaming import FakeTransfer

SLICED = [name for name in OPTIMIZERS if name != "adafactor"]
CPU = torch.device("cpu")
CASES = [(name, torch.float32, "auto") for name in SLICED] + [
    (name, torch.bfloat16, rounding)
    for name in SLICED
    for rounding in ("nearest", "stochastic", "compensated")
]
each_case = pytest.mark.parametrize(
    ("name", "dtype", "rounding"), CASES, ids=lambda value: str(value).removeprefix("torch.")
)


class Model(torch.nn.Module):
    """Tensors of several slices, of one, and of less than a block; one in another layout, one without use."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"table": (123, 70), "matrix": (70, 64), "bias": (33,), "expert": (8, 16)}.items():
            values = torch.randn(shape, generator=generator).mul_(0.1).to(dtype)
            self.register_parameter(name, torch.nn.Parameter(values))
        turned = torch.randn(90, 60, generator=generator).mul_(0.1).to(dtype).t()
        self.turned = torch.nn.Parameter(turned)
        assert not self.turned.is_contiguous()
        self.device = CPU

    def gradients(self, step: int) -> dict[torch.nn.Parameter, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 + step)
        return {
            parameter: torch.randn(parameter.shape, generator=generator).to(parameter)
            for name, parameter in self.named_parameters()
            if not (name == "expert" and step % 2)
        }


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "SLICE", 1024)


def make(
    name: str,
    dtype: torch.dtype,
    rounding: str,
    transfer: Any = None,
    *,
    home: torch.device = CPU,
    compute_device: torch.device = CPU,
) -> tuple[Model, Updater]:
    model = Model(dtype).to(home)
    model.device = home
    return model, make_optimizer(
        model,  # type: ignore[arg-type]
        name,
        lr=1e-3,
        weight_decay=0.1,
        rounding=rounding,
        seed=5,
        compute_device=compute_device,
        transfer=transfer,
    )


def train(model: Model, optimizer: Updater, steps: range) -> None:
    for step in steps:
        for parameter, gradient in model.gradients(step).items():
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        optimizer.step()
        optimizer.zero_grad()


def assert_same_state(one: Updater, other: Updater) -> None:
    found, expected = one.tensors(), other.tensors()
    assert found.keys() == expected.keys() and found
    for key, value in expected.items():
        assert torch.equal(found[key], value) and found[key].dtype == value.dtype, key


@pytest.mark.rotating(2)
@each_case
def test_slices_through_a_device_give_the_bits_of_whole_tensors_at_home(
    name: str, dtype: torch.dtype, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "SLICES_AT_HOME", 10**6)
    whole, expected = make(name, dtype, rounding)
    train(whole, expected, range(3))
    monkeypatch.setattr(slots, "SLICES_AT_HOME", 4)
    at_home, here = make(name, dtype, rounding)
    train(at_home, here, range(3))
    assert_same(at_home, whole)
    assert_same_state(here, expected)
    for is_late in (True, False):
        transfer = FakeTransfer(is_late=is_late)
        streamed, there = make(name, dtype, rounding, transfer)
        train(streamed, there, range(3))
        assert_same(streamed, whole)
        assert_same_state(there, expected)
        assert transfer.num_copies >= 2 * 3 * (9 + 5 + 1 + 6)  # of each slice, there and back


@pytest.mark.gpu
@each_case
def test_on_a_gpu_slices_from_the_host_give_the_bits_of_whole_tensors_at_home(
    name: str, dtype: torch.dtype, rounding: str
) -> None:
    cuda = torch.device("cuda")
    at_home, here = make(name, dtype, rounding, home=cuda)
    streamed, there = make(name, dtype, rounding, compute_device=cuda)
    train(at_home, here, range(3))
    train(streamed, there, range(2))
    for group in there.param_groups:
        group["lr"] = 3e-3
    on_device = {key: value.to(cuda) for key, value in streamed.gradients(2).items()}
    there.update(*on_device, gradients=on_device)
    for (entry, one), other in zip(streamed.named_parameters(), at_home.parameters(), strict=True):
        assert torch.equal(one, other.cpu()), entry
    found, expected = there.tensors(), here.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].cpu(), value.cpu()) for key, value in expected.items())


@pytest.mark.rotating(3)
@each_case
def test_state_moves_between_placements_without_a_change(
    name: str, dtype: torch.dtype, rounding: str, tmp_path: Path
) -> None:
    straight, optimizer = make(name, dtype, rounding)
    train(straight, optimizer, range(4))
    model, before = make(name, dtype, rounding, FakeTransfer())
    for stop, transfer in ((1, None), (2, FakeTransfer()), (3, None), (4, FakeTransfer())):
        train(model, before, range(stop - 1, stop))
        save_file(before.tensors(), tmp_path / "state.safetensors")
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        model, after = make(name, dtype, rounding, transfer)
        model.load_state_dict(weights)
        after.restore(load_file(tmp_path / "state.safetensors"))
        assert_same_state(after, before)
        before = after
    assert_same(model, straight)
    assert_same_state(before, optimizer)


@pytest.mark.parametrize("transfer", [None, FakeTransfer()], ids=["home", "streamed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_given_replace_those_of_the_parameters(
    name: str, dtype: torch.dtype, transfer: Any
) -> None:
    """Also gradients of a higher precision than the weights, and parameter by parameter in any order."""
    usual, expected = make(name, dtype, "auto")
    given, found = make(name, dtype, "auto", transfer)
    for step in range(2):
        train(usual, expected, range(step, step + 1))
        gradients = {key: value.float() for key, value in given.gradients(step).items()}
        for group in found.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        kept = torch.ones_like(given.bias)
        given.bias.grad = kept
        found.update(*list(gradients)[2:], gradients=gradients)
        for parameter in list(gradients)[:2]:
            found.update(parameter, gradients=gradients)
        assert given.bias.grad is kept and torch.equal(kept, torch.ones_like(kept))
    assert_same(given, usual)
    assert_same_state(found, expected)


@pytest.mark.rotating(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_moments_do_not_freeze(dtype: torch.dtype) -> None:
    """After gradients of 1, those of 0.01: the second moment decays by a thousandth an update, which rounding to
    the nearest would lose.
    """
    model = torch.nn.ParameterDict({"weight": torch.zeros(4096, dtype=dtype)})
    model.device = CPU  # type: ignore[assignment]
    optimizer = make_optimizer(model, "adamw-bf16", lr=1e-4, weight_decay=0.0)  # type: ignore[arg-type]
    exact, nearest = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.bfloat16)
    for step in range(300):
        size = 1.0 if step < 50 else 0.01
        model["weight"].grad = torch.full_like(model["weight"], size)
        square = float(model["weight"].grad[0]) ** 2
        optimizer.step()
        exact = 0.999 * exact + 0.001 * square
        nearest = (0.999 * nearest.float() + 0.001 * square).bfloat16()
        if step == 49:
            largest = exact.clone()
    moment = optimizer.tensors()["weight/exp_avg_sq"]
    assert moment.dtype == torch.bfloat16 and exact < 0.8 * largest
    assert moment.double().mean() == pytest.approx(exact.item(), rel=2e-3)
    assert nearest.item() > 0.95 * largest.item()


def fit(name: str, dtype: torch.dtype = torch.float32, steps: int = 150) -> list[float]:
    """Losses of a small network that learns a fixed function."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 8, generator=generator)
    targets = inputs.sin().sum(1, keepdim=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).to(dtype)
    model.device = CPU  # type: ignore[assignment]
    optimizer = make_optimizer(model, name, lr=5e-3, weight_decay=0.01)  # type: ignore[arg-type]
    losses = []
    for _ in range(steps):
        loss = (model(inputs.to(dtype)).float() - targets).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.rotating(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_bfloat16_moments_follows_that_with_float32_moments(dtype: torch.dtype) -> None:
    exact, found = fit("adamw", dtype), fit("adamw-bf16", dtype)
    assert exact[-1] < 0.1 * exact[0]
    assert sum(found[50:]) == pytest.approx(sum(exact[50:]), rel=0.05)


def test_adafactor_stays_at_home() -> None:
    transfer = FakeTransfer()
    model, optimizer = make("adafactor", torch.bfloat16, "auto", transfer)
    train(model, optimizer, range(2))
    assert not transfer.num_copies


def test_an_error_within_an_update_leaves_the_state_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make("adamw", torch.bfloat16, "auto")
    train(model, optimizer, range(1))
    shapes = {key: value.shape for key, value in optimizer.tensors().items()}

    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(optimizer._base, "step", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        train(model, optimizer, range(1, 2))
    assert {key: value.shape for key, value in optimizer.tensors().items()} == shapes


def test_layouts_of_gradients_and_weights_make_no_difference() -> None:
    """torch's fused AdamW reads memory in order, whatever the strides."""
    usual, expected = make("adamw", torch.float32, "auto")
    other, found = make("adamw", torch.float32, "auto")
    for step in range(2):
        for model in (usual, other):
            for parameter, gradient in model.gradients(step).items():
                is_turned = model is other and gradient.ndim == 2
                parameter.grad = gradient.t().contiguous().t() if is_turned else gradient
        expected.step(), found.step()
    assert_same(other, usual)
    plain = torch.optim.AdamW(Model(torch.float32).parameters(), fused=False, weight_decay=0.1)
    reference = plain.param_groups[0]["params"]
    for parameter, gradient in zip(reference, Model(torch.float32).gradients(0).values(), strict=True):
        parameter.grad = gradient
    plain.step()
    first, optimizer = make("adamw", torch.float32, "auto")
    train(first, optimizer, range(1))
    for one, parameter in zip(first.parameters(), reference, strict=True):
        if parameter.ndim == 2:  # which are decayed
            assert torch.allclose(one, parameter, atol=1e-7)


@pytest.mark.parametrize(("name", "most"), [("adamw-8bit", 0.05), ("adamw-bf16", 0.01)])
def test_small_state_goes_where_float32_goes_for_gradients_of_all_sizes(name: str, most: float) -> None:
    """Six decades in one tensor, and blocks that are all zero."""
    if name not in OPTIMIZERS:
        pytest.skip("needs bitsandbytes")
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-6, 0, 8192) * (torch.arange(8192) % 1024 < 768)

    def run(name: str) -> torch.Tensor:
        generator.manual_seed(1)
        model = torch.nn.ParameterDict({"weight": torch.zeros(8192)})
        model.device = CPU  # type: ignore[assignment]
        optimizer = make_optimizer(model, name, lr=1e-3, weight_decay=0.01)  # type: ignore[arg-type]
        for _ in range(30):
            model["weight"].grad = torch.randn(8192, generator=generator) * sizes
            optimizer.step()
        return model["weight"].detach()

    exact, found = run("adamw"), run(name)
    assert found[sizes == 0].eq(0).all() and exact[sizes > 0].ne(0).all()
    assert (found - exact).abs().mean() < most * exact.abs().mean()


# -- shards ------------------------------------------------------------------------------------------------

NUM_RANKS = 3


def shards_of(model: Model, rank: int) -> dict[str, LocalShard]:
    """The rows that a rank has, as parameters of their own."""
    found = {}
    for name, parameter in model.named_parameters():
        per_rank = -(-len(parameter) // NUM_RANKS)
        start, stop = min(rank * per_rank, len(parameter)), min((rank + 1) * per_rank, len(parameter))
        rows = torch.nn.Parameter(parameter.detach()[start:stop].clone(memory_format=torch.contiguous_format))
        found[name] = LocalShard(rows, parameter.shape, start, stop)
    return found


def train_shards(name: str, dtype: torch.dtype, rounding: str, seed: int = 5) -> tuple[Model, list[Updater]]:
    """The model of `train` after three steps, each rank's rows updated by an optimizer of its own."""
    model, updaters = Model(dtype), list[Updater]()
    for rank in range(NUM_RANKS):
        shards = shards_of(model, rank)
        updater = make_optimizer(
            model,  # type: ignore[arg-type]
            name,
            lr=1e-3,
            weight_decay=0.1,
            rounding=rounding,
            seed=seed,
            shards=shards,
        )
        for step in range(3):
            gradients = {id(one): gradient for one, gradient in model.gradients(step).items()}
            for path, parameter in model.named_parameters():
                shard = shards[path]
                gradient = gradients.get(id(parameter))
                shard.parameter.grad = None if gradient is None else gradient[shard.start : shard.stop]
            for group in updater.param_groups:
                group["lr"] = 1e-3 * (step + 1)
            updater.step()
            updater.zero_grad()
        updaters.append(updater)
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.cat([updater.parameters[place] for updater in updaters]))
    return model, updaters


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "auto"), (torch.bfloat16, "nearest"), (torch.bfloat16, "compensated")],
    ids=str,
)
def test_ranks_update_their_rows_as_one_updates_all(dtype: torch.dtype, rounding: str) -> None:
    whole, expected = make("adamw", dtype, rounding)
    train(whole, expected, range(3))
    cut, updaters = train_shards("adamw", dtype, rounding)
    assert_same(cut, whole)
    for key, value in expected.tensors().items():
        rows = [updater.tensors()[key] for updater in updaters]
        found = torch.cat(rows) if value.ndim else rows[0]
        assert found.dtype == value.dtype
        # torch's kernel rounds the last values of a tensor in another way
        torch.testing.assert_close(found.double(), value.double(), rtol=1e-6, atol=key.endswith("rest"))


def test_ranks_round_at_random_independently() -> None:
    """Equal rows of different ranks, with equal gradients, are rounded differently; the mean is right."""
    values = torch.full((NUM_RANKS * 4, 256), 0.1, dtype=torch.bfloat16)
    drawn = []
    for rank in range(NUM_RANKS):
        model = torch.nn.Module()
        model.table = torch.nn.Parameter(values.clone())
        model.device = CPU
        rows = torch.nn.Parameter(values[:4].clone())
        shards = {"table": LocalShard(rows, values.shape, rank * 4, rank * 4 + 4)}
        updater = make_optimizer(model, "adamw", lr=1e-4, weight_decay=0.0, seed=5, shards=shards)  # type: ignore[arg-type]
        rows.grad = torch.ones_like(rows)
        updater.step()
        drawn.append(rows.detach().float().flatten())
    assert not any(torch.equal(one, other) for one, other in zip(drawn, drawn[1:] + drawn[:1], strict=True))
    expected = float(values[0, 0]) - 1e-4
    for one in drawn:
        assert abs(float(one.mean()) - expected) < 4 * float(one.std()) / len(one) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack(drawn[:2]))[0, 1])) < 4 / len(drawn[0]) ** 0.5


@pytest.mark.parametrize("name", ["adafactor", "adamw-8bit"])
def test_an_optimizer_that_is_not_tested_on_shards_is_refused(name: str) -> None:
    model = Model(torch.float32)
    with pytest.raises(OptionError, match=f"`optimizer` {name}: it is not tested on shards of weights"):
        make_optimizer(model, name, lr=1e-3, weight_decay=0.1, shards=shards_of(model, 0))  # type: ignore[arg-type]
