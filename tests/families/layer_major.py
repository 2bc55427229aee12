"""Whether a family's layer-major run is its plain run: log-probs to the bit, gradients tensor by tensor."""

from __future__ import annotations

import torch

from dpo_cache.lm.layerwise.policy import LayerMajorRun
from dpo_cache.lm.layerwise.record import NotLayerMajorError, find_layers
from dpo_cache.lm.layerwise.states import DeviceStates
from dpo_cache.lm.layerwise.weights import ResidentWeights
from dpo_cache.lm.policy import CompletionLogps, PolicyModel, decoder_pass, run_at_once
from dpo_cache.types import Completion

MAX_GAP = 1e-5  # of a tensor's gradient, relative to its norm, or to a hundred-thousandth of the largest norm

Gradients = dict[str, torch.Tensor]


def check_layer_major(policy: PolicyModel, completions: list[Completion]) -> tuple[str, list[str]]:
    """`yes`, or why the family is refused; and what is wrong with it if it is not."""
    if policy.attention.is_whole:
        return "no: its forward is run as a whole", []
    pieces = [completions[:2], completions[2:]]
    try:
        with torch.no_grad():
            first = run_at_once(pieces[0], policy.attention)[0]
            layers = find_layers(
                policy.model, **decoder_pass(policy.model, first, policy.attention).arguments
            )
    except NotLayerMajorError as error:
        return f"no: {error}", []
    with torch.no_grad():
        expected = policy(pieces)  # as the layers run: attention may take another kernel for gradients
    torch.stack([_loss(logps, place) for place, logps in enumerate(policy(pieces))]).sum().backward()
    own = _take_gradients(policy)
    run, wrong = LayerMajorRun(policy, layers, ResidentWeights(), DeviceStates()), []
    run.forward(pieces)
    for place, one in enumerate(expected):
        logps = run.logps(place)
        if not torch.equal(logps.tokens_T, one.tokens_T):
            gap = float((logps.tokens_T - one.tokens_T).abs().max())
            wrong.append(f"layer-major: log-probs differ by {gap:.2g}")
        _loss(logps, place).backward()
        run.end_top(place)
    run.backward(lambda _: None)
    return "yes", [*wrong, *_differing(_take_gradients(policy), own)]


def _loss(logps: CompletionLogps, place: int) -> torch.Tensor:
    sums = logps.sums()
    return (place + 1) * (sums * torch.linspace(0.5, -0.4, len(sums), dtype=sums.dtype)).sum()


def _take_gradients(policy: PolicyModel) -> Gradients:
    named = policy.model.named_parameters()
    found = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
    policy.model.zero_grad(set_to_none=True)
    return found


def _differing(found: Gradients, own: Gradients) -> list[str]:
    least = 1e-5 * max(float(one.norm()) for one in own.values())
    wrong = []
    for name in found.keys() | own.keys():
        present = own[name] if name in own else found[name]
        one, other = (values.get(name, torch.zeros_like(present)) for values in (found, own))
        gap = float((one - other).norm()) / (float(other.norm()) + least)
        if not gap <= MAX_GAP:
            wrong.append(f"layer-major: the gradient of {name} is off by {gap:.2g}")
    return wrong
