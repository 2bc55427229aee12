"""Towers for images and sound in a checkpoint with a language model: rows of text never reach them.

Such a checkpoint is loaded in its own class, with None in place of its towers: the names of its modules and
tensors, its config and its forward on text stay those of the whole. Layers between a tower and the language
model are small and stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.nn import Module
from transformers import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from dpo_cache.lm.model.architecture import whole_name
from dpo_cache.lm.model.tensor_digest import tensor_names_in

if TYPE_CHECKING:  # importing it takes long
    from transformers import PreTrainedModel


def text_filter(model: PreTrainedModel) -> Callable[[str], bool]:
    """A function of the name of a tensor or module: whether a row of text can reach it.

    In a model of text and something else, these are its language model and its head.
    """
    parts = _text_parts(model)
    return lambda name: not parts or any(_is_in(name, part) for part in parts)


def towers_of(model: PreTrainedModel) -> list[str]:
    """The names of the models inside that no row of text reaches."""
    parts, towers = _text_parts(model), list[str]()
    for name, module in model.named_modules() if parts else ():
        is_outermost = not any(_is_in(name, one) for one in towers)
        is_apart = not any(_is_in(part, name) or _is_in(name, part) for part in parts)
        if is_outermost and is_apart and isinstance(module, transformers.PreTrainedModel):
            towers.append(name)
    return towers


def loading_class(config: PreTrainedConfig, adapter_file: Path | None = None) -> type[PreTrainedModel] | None:
    """The class that loads a checkpoint with towers, without them; None for one that has none.

    With towers if the adapter in the file was trained with layers in them. None also for an adapter that was
    trained in the class of the text part, which `AutoModelForCausalLM` loads.
    """
    name = whole_name(config)
    if name is None:
        return None
    whole: type[PreTrainedModel] = getattr(transformers, name)
    kinds = (_without_towers(whole), whole)
    if adapter_file is None:
        return kinds[0]
    tensors = tensor_names_in([adapter_file])
    return next((kind for kind in kinds if _has_modules_of(make_empty_whole(kind, config), tensors)), None)


def make_empty_whole(
    kind: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model of this class without weights, on the meta device."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return as_whole(kind._from_config(copy.deepcopy(config), dtype=dtype))


def as_whole(model: PreTrainedModel) -> PreTrainedModel:
    """The model of a class of `loading_class` in its class of transformers."""
    kind = type(model)
    if kind.__dict__.get("_dpo_cache_whole"):
        model.__class__ = kind.__bases__[0]
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        # its forward reads a field that the output of its language model does not have (transformers 5.24)
        model.language_model.register_forward_hook(_with_image_outputs)  # type: ignore[operator,union-attr]
    return model


@contextmanager
def frozen_towers(model: PreTrainedModel) -> Iterator[None]:
    """In this block, weights that no row of text reaches are not trained."""
    is_for_text = text_filter(model)
    frozen = [one for name, one in model.named_parameters() if one.requires_grad and not is_for_text(name)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _is_in(name: str, module: str) -> bool:
    """Return whether a tensor or module is a part of a module, or that module; "" is the model."""
    return not module or f"{name}.".startswith(f"{module}.")


def _text_parts(model: PreTrainedModel) -> list[str]:
    """The names of the decoder, the embeddings and the head; none if all of the model is for text."""
    if model.config.get_text_config() is model.config:
        return []
    ends = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    parts = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    return [] if len(parts) < 2 or "" in parts else parts


def _without_towers(whole: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class whose models are those of `whole` with None in place of their towers."""

    def initialize(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        with _without_timm():
            whole.__init__(self, config, *args, **kwargs)
        for name in towers_of(self):
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, None)
        present = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        tied = getattr(self, "all_tied_weights_keys", {})
        self.all_tied_weights_keys = {name: source for name, source in tied.items() if name in present}

    members = {"__init__": initialize, "__module__": whole.__module__, "_dpo_cache_whole": True}
    return type(whole.__name__, (whole,), members)


@contextmanager
def _without_timm() -> Iterator[None]:
    """In this block, `AutoModel` makes None of a tower of timm where timm is not installed."""
    if find_spec("timm") is not None:
        yield
        return
    make = transformers.AutoModel.from_config

    def from_config(config: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
        is_of_timm = MODEL_MAPPING_NAMES.get(config.model_type) == "TimmWrapperModel"
        return None if is_of_timm else make(config, *args, **kwargs)

    transformers.AutoModel.from_config = from_config  # type: ignore[method-assign]
    try:
        yield
    finally:
        del transformers.AutoModel.from_config  # type: ignore[misc]  # it is in the base class


def _has_modules_of(model: Module, tensors: Iterable[str]) -> bool:
    """Return whether the model has the modules of an adapter's tensors."""
    modules = {name for name, _ in model.named_modules()}

    def is_in_one(tensor: str) -> bool:
        path = tensor.removeprefix("base_model.model.").split(".")
        return any(".".join(path[:-dropped]) in modules for dropped in (1, 2, 3) if len(path) > dropped + 1)

    return all(map(is_in_one, tensors))


def _with_image_outputs(_: Module, __: Any, output: Any) -> None:
    if isinstance(output, ModelOutput) and not hasattr(output, "image_outputs"):
        output.image_outputs = None  # type: ignore[attr-defined]
