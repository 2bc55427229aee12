"""How evenly a mixture-of-experts model spreads tokens over its experts, and the loss that evens it out.

L tokens run, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from dpo_cache.errors import OptionError


class Routing(NamedTuple):
    """Sums over tokens and layers, each token once for every completion that contains it."""

    choices_E: torch.Tensor  # float32, times that an expert was among the K chosen; no gradients
    probs_E: torch.Tensor  # float32, router probabilities; with gradients
    num_rows: torch.Tensor  # tokens times layers

    def detach(self) -> Routing:
        """The same values as leaves, whose probabilities collect gradients."""
        return self._replace(probs_E=self.probs_E.detach().requires_grad_())


def router_coefficient(model: PreTrainedModel, requested: float | None) -> float:
    """Weight of the router loss in the training loss; 0 for a model that has none.

    The weight is `requested`, or the one in the model's config. Raises `OptionError` where it is requested
    for a model without routers.
    """
    config = model.config.get_text_config()
    has_router = hasattr(config, "output_router_logits") and _may_have_routers(model)
    if requested and not has_router:
        raise OptionError(
            f"`router_aux_loss_coef` {requested}: {type(model).__name__} returns no router logits.\n"
            "Leave it out."
        )
    if requested and not hasattr(config, "num_experts_per_tok"):
        raise OptionError(
            f"`router_aux_loss_coef` {requested}: the config of {type(model).__name__} has no "
            "`num_experts_per_tok`, so the chosen experts are not known.\nLeave it out."
        )
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) if requested is None else requested
    return float(coefficient or 0.0) if has_router else 0.0


def _may_have_routers(model: PreTrainedModel) -> bool:
    """Return whether a module is of a class whose router logits transformers collects; a family of mixtures
    may have models without experts. True where the code does not name such classes.
    """
    recorders = [
        recorder
        for inner in model.modules()
        for given in [(getattr(inner, "_can_record_outputs", None) or {}).get("router_logits", [])]
        for recorder in (given if isinstance(given, list) else [given])
    ]
    kinds = tuple(getattr(recorder, "target_class", recorder) for recorder in recorders)
    if not kinds or not all(isinstance(kind, type) for kind in kinds):
        return True
    return any(isinstance(module, kinds) for module in model.modules())


def measure_routing(
    router_logits: Sequence[torch.Tensor], weights_L: torch.Tensor, num_chosen: int
) -> Routing:
    """Routing of the tokens of one forward pass.

    `router_logits` is one tensor [L, E] a layer; a token counts `weights_L` times, so a shared prompt counts
    as in a batch that repeats it in each row, and padding counts 0 times.
    """
    weights_L = weights_L.to(torch.float32)
    choices_E = torch.zeros(router_logits[0].shape[-1], device=weights_L.device)
    probs_E = torch.zeros_like(choices_E)
    for logits_LE in router_logits:
        probs_LE = logits_LE.softmax(-1)
        chosen_LK = probs_LE.detach().topk(num_chosen, -1).indices
        choices_E = choices_E.index_add(0, chosen_LK.flatten(), weights_L.repeat_interleave(num_chosen))
        probs_E = probs_E + (probs_LE.float() * weights_L[:, None]).sum(0)
    return Routing(choices_E, probs_E, weights_L.sum() * len(router_logits))


def add_routings(routings: Sequence[Routing]) -> Routing:
    """The sums over the tokens of all of them."""
    return Routing(*(torch.stack(values).sum(0) for values in zip(*routings, strict=True)))
