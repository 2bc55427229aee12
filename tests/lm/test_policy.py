"""The policy as one module, which DDP and FSDP2 can wrap."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from dpo_cache.lm.policy import PolicyModel, completion_logps
from dpo_cache.lm.self_check import choose_attention
from dpo_cache.types import Completion
from tests import programs
from tests.conftest import make_completions, make_llama

COMPLETIONS = make_completions(num_prompts=4)
HALVES = (COMPLETIONS[::2], COMPLETIONS[1::2])  # each rank has other completions, and another number of them
Gradients = dict[str, torch.Tensor]


def make_policy() -> PolicyModel:
    model = make_llama()
    return PolicyModel(model, choose_attention(model, max_length=64))


def backward(policy: torch.nn.Module, completions: list[Completion]) -> None:
    # two forward and backward passes, as in a step of two parts
    for part in (completions[:3], completions[3:]):
        (logps,) = policy([part])
        (logps.sums().sum() / len(completions)).backward()


def gradients(model: torch.nn.Module) -> Gradients:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_the_log_probs_are_those_of_the_model() -> None:
    policy = make_policy()
    expected = [completion_logps(policy.model, part, policy.attention) for part in HALVES]
    found = policy(HALVES)  # a whole step at once
    assert [logps.lengths for logps in found] == [logps.lengths for logps in expected]
    assert all(torch.equal(one.tokens_T, other.tokens_T) for one, other in zip(found, expected, strict=True))


def test_every_call_of_the_model_goes_through_the_policy() -> None:
    policy, inside, calls = make_policy(), [False], []
    policy.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    policy.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    for module in policy.model.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(inside[0]))
    backward(policy, COMPLETIONS)
    assert calls and all(calls)


def wrap_ddp(policy: PolicyModel) -> torch.nn.Module:
    return DistributedDataParallel(policy)


def wrap_fsdp(policy: PolicyModel) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in policy.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(policy, mesh=mesh)


WRAPPERS: dict[str, Callable[[PolicyModel], torch.nn.Module]] = {
    "none": lambda policy: policy,
    "ddp": wrap_ddp,
    "fsdp": wrap_fsdp,
}


def run_rank(rank: int, folder: str) -> None:
    """Take each wrapper's gradients on this rank's half, and save them whole."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for name, wrap in WRAPPERS.items():
            policy = make_policy()
            backward(wrap(policy), HALVES[rank])
            whole = {
                weight: gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                for weight, gradient in gradients(policy).items()
            }
            torch.save(whole, f"{folder}/{name}-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_wrapper(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Gradients]]:
    """The gradients on two ranks, by what wraps the policy."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(run_rank, args=(str(folder),), nprocs=2, start_method=programs.START_METHOD)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        for name in WRAPPERS
    }


def mean_of_both() -> Gradients:
    """The gradients of both halves, each with its own mean, averaged: what DDP and FSDP2 promise."""
    separate = []
    for half in HALVES:
        policy = make_policy()
        backward(policy, half)
        separate.append(gradients(policy))
    return {name: (separate[0][name] + separate[1][name]) / 2 for name in separate[0]}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_are_reduced_over_two_processes(
    by_wrapper: dict[str, list[Gradients]], wrapper: str
) -> None:
    expected, (one, other) = mean_of_both(), by_wrapper[wrapper]
    assert one.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], gradient, rtol=1e-5, atol=1e-5)


def test_without_a_wrapper_the_gradients_of_two_processes_differ(
    by_wrapper: dict[str, list[Gradients]],
) -> None:
    one, other = by_wrapper["none"]
    assert not any(torch.allclose(one[name], other[name], rtol=1e-2, atol=1e-2) for name in one)
