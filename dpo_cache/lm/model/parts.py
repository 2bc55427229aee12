"""The two parts of a causal LM: a decoder that ends in hidden states, and a head that computes logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dpo_cache.errors import ModelError

Head = Callable[[torch.Tensor], torch.Tensor]  # hidden [T, D] -> logits [T, V]


def has_plain_head(model: PreTrainedModel) -> bool:
    """Return whether the model computes logits from hidden states by one linear layer without a bias."""
    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear or layer.bias is not None:
        return False
    # accelerate's hooks may fetch the weight, which is on the meta device until then
    device = model.device if layer.weight.is_meta else layer.weight.device
    probe_TD = torch.linspace(-1, 1, 2 * layer.in_features).view(2, -1).to(device, layer.weight.dtype)
    with torch.no_grad():
        return torch.equal(head_of(model)(probe_TD), layer(probe_TD[None])[0])


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The part of a causal LM that ends in hidden states."""
    return model.get_submodule(_decoder_name(model))


def head_of(model: PreTrainedModel) -> Head:
    """The rest of a causal LM: its own `forward` from hidden states on, with scaling, caps and biases.

    Calls a view of the model that shares its modules, but whose decoder returns the given hidden states.
    """
    decoder = _GivenHidden(decoder_of(model))
    view = _view(model, _decoder_name(model).split("."), decoder)

    def head(hidden_TD: torch.Tensor) -> torch.Tensor:
        decoder.hidden = hidden_TD[None]
        try:
            return view(inputs_embeds=decoder.hidden, use_cache=False).logits[0]
        finally:
            decoder.hidden = None

    return head


def _view(module: Any, path: list[str], decoder: _GivenHidden) -> Any:
    """A shallow copy of the module with the decoder at the path."""
    view = copy.copy(module)
    inner = decoder if len(path) == 1 else _view(module._modules[path[0]], path[1:], decoder)
    view._modules = {**module._modules, path[0]: inner}
    # a `forward` that was set on the module, as accelerate does, would call the module instead of the view
    view.__dict__.pop("forward", None)
    return view


def _decoder_name(model: PreTrainedModel) -> str:
    """The path of the decoder; a model may have a whole causal LM inside, as Llama 4 does."""
    if model.base_model_prefix in model._modules:
        return model.base_model_prefix
    names = [name for name, module in model.named_children() if isinstance(module, PreTrainedModel)]
    if len(names) != 1:
        raise ModelError(
            f"{type(model).__name__} is not built as one decoder and a head; it cannot be used.\n"
            "Give a text-only causal LM."
        )
    inner: Any = model._modules[names[0]]
    if inner.get_output_embeddings() is None:
        return names[0]
    return f"{names[0]}.{_decoder_name(inner)}"


class _GivenHidden(torch.nn.Module):
    """In place of a decoder: returns the hidden states that it is given. Its other attributes are
    the decoder's, where some heads find a factor.
    """

    hidden: torch.Tensor | None = None

    def __init__(self, decoder: torch.nn.Module):
        super().__init__()
        self.__dict__["_decoder"] = decoder  # not as a module of this one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_decoder"], name)

    @property
    def decoder(self) -> _GivenHidden:  # some families call `self.model.decoder`
        return self

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return _HiddenOnly(last_hidden_state=self.hidden)


class _HiddenOnly(BaseModelOutputWithPast):
    """A decoder's output with nothing but the hidden states; other fields, which some families read, are
    None.
    """

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and key > 0:
            raise IndexError("its LM head reads more than the last hidden states of its decoder")
        return super().__getitem__(key)
