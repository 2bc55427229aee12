"""A run whose policy is wrapped: two processes train as one process does, with what DDP reduces."""

import json
import os
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from dpo_cache.options.train import TrainOptions
from dpo_cache.training.batches import stream_pairs
from dpo_cache.training.output.samples import open_sampler
from dpo_cache.training.setup import open_setup
from dpo_cache.training.step import TrainingStep
from tests import programs

WORLD = 2
BUDGETS = {"one part": "100000", "several parts": "150", "a pair in two pieces": "20"}


def take_step(cache: str, output: str, budget: str, rank: int | None = None) -> dict:
    """The weights, the evaluation and the samples after one step of 8 pairs, of which a rank takes half."""
    options = TrainOptions(
        cache=cache, output=output, pairs="pairs", eval_pairs="heldout", sample=2, budget_tokens=budget, lr=1e-2
    )  # fmt: skip
    with open_setup(options, lambda _: None) as setup:
        policy: torch.nn.Module = setup.policy_model()
        if rank is not None:
            policy = DistributedDataParallel(policy)
        every = setup.data.selected
        pairs = list(islice(stream_pairs(setup.data.pairs, every, shuffle=False, seed=0, epoch=0), 8))
        step = TrainingStep(setup, policy, None)
        loss = step.take(pairs if rank is None else pairs[rank::WORLD], 1, 1e-2)[0].means()["loss"]
        Path(output).mkdir()
        sampler = open_sampler(setup, policy)
        assert sampler is not None
        sampler.write(1)
        return {
            "loss": loss,
            "evaluation": step.evaluate(1),
            "samples": (Path(output) / "samples.jsonl").read_text(),
            "weights": {
                name: weight.detach().clone() for name, weight in setup.policy.model.named_parameters()
            },
        }


def run_rank(rank: int, folder: str, cache: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        for name, budget in BUDGETS.items():
            found = take_step(cache, f"{folder}/{name} {rank}", budget, rank)
            torch.save(found, f"{folder}/{name}-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(cache: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What each of two processes has after its step, by the number of parts."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(run_rank, args=(str(folder), cache), nprocs=WORLD, start_method=programs.START_METHOD)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(WORLD)]
        for name in BUDGETS
    }


@pytest.fixture(scope="module")
def plain(cache: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What one process has after the step of all pairs, its policy not wrapped."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: take_step(cache, str(folder / name), budget) for name, budget in BUDGETS.items()}


@pytest.mark.parametrize("name", BUDGETS)
def test_two_processes_take_the_step_of_one(
    plain: dict[str, dict], ranks: dict[str, list[dict]], name: str
) -> None:
    expected, (one, other) = plain[name], ranks[name]
    assert one["loss"] != other["loss"]  # other pairs
    assert (one["loss"] + other["loss"]) / 2 == pytest.approx(expected["loss"], rel=1e-5)
    for weight, value in expected["weights"].items():
        assert torch.equal(one["weights"][weight], other["weights"][weight])
        torch.testing.assert_close(one["weights"][weight], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_wrapped_policy_is_evaluated_and_sampled(
    plain: dict[str, dict], ranks: dict[str, list[dict]], name: str
) -> None:
    expected, (one, other) = plain[name], ranks[name]
    assert one["evaluation"] == other["evaluation"] and one["samples"] == other["samples"]
    for measure, value in expected["evaluation"].items():
        assert one["evaluation"][measure] == pytest.approx(value, rel=1e-3, abs=1e-4), measure
    answers = [
        [json.loads(line)["row"] for line in found["samples"].splitlines()] for found in (one, expected)
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 2
