"""A check that a model in memory computes with nothing but its classes, and these with nothing but their
files.

Hooks, a method of one module or of a class of transformers that was replaced, a function of a module of
transformers that was, and attention functions that a user registered can change every log-prob, and no
tensor and no config shows them. They cannot be identified.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules import module as all_modules
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import moe
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.class_code import foreign_classes, foreign_function, home_of, is_of_library

# Names of fields of a config -> where the function of that name is found
REGISTRIES: dict[str, list[Any]] = {
    "_attn_implementation": [ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS],
    "_experts_implementation": [getattr(moe, "ALL_EXPERTS_FUNCTIONS", {})],
}
# Functions that a model of any family may call, besides those of its own modules
SHARED_MODULES = (
    "torch.nn.functional",
    "transformers.masking_utils",
    "transformers.modeling_rope_utils",
    "transformers.integrations.sdpa_attention",
    "transformers.integrations.moe",
)
CAPTURER = "transformers.utils.output_capturing"
MOVERS = ("accelerate.hooks", "accelerate.big_modeling")
RUN_WITHOUT = "Define a class of your own in a file, or run without the replacement."
DEFINE_A_CLASS = "Define a class in a file, or give the model as it was loaded."


def check_untouched(model: PreTrainedModel, name: str) -> None:
    """Raise `ModelError` for a model whose computation was changed from outside.

    Hooks of accelerate, which move tensors between devices, change no number.
    """
    _check_hooks(model, name)
    _check_instances(model, name)
    kinds = {one for module in model.modules() for one in type(module).__mro__}
    for kind in kinds - foreign_classes(kinds):
        if kind.__module__.partition(".")[0] in ("torch", "transformers"):
            _check_class(kind, name)
    for module in sorted({one.__module__ for one in kinds} | {*SHARED_MODULES}):
        if module.startswith(("transformers.", "torch.nn.functional")) and module in sys.modules:
            _check_functions(sys.modules[module], name)
    for config in configs_of(model):
        _check_registered(config, name, {one.__module__ for one in kinds})


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """All configs that the model's modules read, each once."""
    found = [value for module in model.modules() for value in vars(module).values()]
    configs = {id(one): one for one in [model.config, *found] if isinstance(one, PreTrainedConfig)}
    for one in [*configs.values()]:
        inner = [value for value in vars(one).values() if isinstance(value, PreTrainedConfig)]
        configs |= {id(value): value for value in inner}
    return list(configs.values())


def _check_hooks(model: PreTrainedModel, name: str) -> None:
    if all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks:
        raise ModelError(
            f"{name}: there are hooks on the forward pass of every module (torch.nn.modules.module), and "
            "their effect cannot be identified.\nRemove them (the handle that registering one returned has "
            "`remove()`)."
        )
    for path, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if not all(map(_only_captures, hooks)):
            raise ModelError(
                f"{name}: {path or 'the model'} has hooks on its forward pass, and what they do cannot be "
                "identified.\nRemove them (the handle that registering one returned has `remove()`)."
            )


def _check_instances(model: PreTrainedModel, name: str) -> None:
    """Raise `ModelError` for a method, or another function, that one module has of its own."""
    own = {kind.__module__ for kind in foreign_classes({type(module) for module in model.modules()})}
    for path, module in model.named_modules():
        place = path or "the model"
        for key, value in vars(module).items():
            if not callable(value) or isinstance(value, Module | torch.Tensor | type):
                continue
            if key == "_compiled_call_impl" and _is_compiled(value, module):
                continue
            foreign = foreign_function(value)
            is_method = hasattr(type(module), key) and not (foreign is None and _only_moves(value))
            if is_method or (foreign is not None and home_of(foreign) not in own):
                kind = "method" if hasattr(type(module), key) else "function"
                raise ModelError(
                    f"{name}: the {kind} {key} of {place} was replaced, and such code cannot be "
                    f"identified.\n{DEFINE_A_CLASS}"
                )


def _only_captures(hook: Any) -> bool:
    """Return whether it is a hook of transformers' own, which keeps the outputs that a caller wants."""
    return isinstance(hook, types.FunctionType) and home_of(hook) == CAPTURER


def _only_moves(value: Any) -> bool:
    """Return whether it is one of accelerate's methods for models on several devices."""
    function = value.func if isinstance(value, functools.partial) else value
    return isinstance(function, types.FunctionType) and home_of(function) in MOVERS


def _is_compiled(value: Any, module: Module) -> bool:
    """Return whether it is what `module.compile()` makes of the module's own call."""
    original = getattr(value, "_torchdynamo_orig_callable", None)
    return isinstance(original, types.MethodType) and (
        original.__func__ is Module._call_impl and original.__self__ is module
    )


def _check_class(kind: type, name: str) -> None:
    """Raise `ModelError` for a method of a class of a library that comes from elsewhere."""
    for key, value in vars(kind).items():
        function = _function_in(value)
        if function is None:
            continue
        is_strange = _is_of_another_model(function, kind.__module__)
        if is_strange or foreign_function(function) is not None:
            raise ModelError(
                f"{name}: the method {key} of {kind.__module__}.{kind.__qualname__} was replaced, and such "
                f"code cannot be identified.\n{RUN_WITHOUT}"
            )


def _function_in(value: Any) -> types.FunctionType | None:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    return value if isinstance(value, types.FunctionType) else None


def _is_of_another_model(function: types.FunctionType, module: str) -> bool:
    """Return whether a function of this module of transformers comes from the code of another model."""
    home = home_of(inspect.unwrap(function))
    return (
        module.startswith("transformers.models.")
        and home.startswith("transformers.models.")
        and home != module
    )


def _check_functions(module: types.ModuleType, name: str) -> None:
    """Raise `ModelError` for a function of a library's module that comes from elsewhere."""
    source: str | None = None
    for key, value in vars(module).items():
        if not isinstance(value, types.FunctionType):
            continue
        foreign, is_strange = foreign_function(value), _is_of_another_model(value, module.__name__)
        if foreign is None and not is_strange:
            continue
        source = source if source is not None else _source_of(module)
        is_defined = re.search(rf"^def {re.escape(key)}\(", source, re.MULTILINE) is not None
        if is_defined if foreign is None else not _imports(source, home_of(foreign)):
            raise ModelError(
                f"{name}: the function {key} of {module.__name__} was replaced, and such code cannot be "
                f"identified.\n{RUN_WITHOUT}"
            )


def _imports(source: str, module: str) -> bool:
    """Return whether a file imports from the package of a module."""
    package = re.escape(module.partition(".")[0])
    return re.search(rf"^\s*(from|import) {package}\b", source, re.MULTILINE) is not None


def _source_of(module: types.ModuleType) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""


def _check_registered(config: PreTrainedConfig, name: str, modules: set[str]) -> None:
    """Raise `ModelError` for an attention function, or one of experts, that a user registered."""
    for field, registries in REGISTRIES.items():
        chosen = getattr(config, field, None)
        if not isinstance(chosen, str):
            continue
        for registry in [*registries, *_local_registries(modules, registries)]:
            function = registry.get(chosen.removeprefix("paged|")) if hasattr(registry, "get") else None
            if function is not None and _is_strange(function):
                found = getattr(function, "__qualname__", function)
                raise ModelError(
                    f"{name}: its {field.strip('_')} is {chosen!r}, a function that was registered from "
                    f"outside of transformers ({found}), and such code cannot be identified.\n"
                    "Give the model with `set_attn_implementation('sdpa')`."
                )


def _local_registries(modules: set[str], registries: list[Any]) -> Iterator[Any]:
    """Registries of the same kinds that a file of a model has of its own."""
    kinds = tuple({type(registry) for registry in registries} - {dict})
    for module in modules:
        for value in vars(sys.modules.get(module, types.ModuleType("none"))).values():
            if isinstance(value, kinds):
                yield value


def _is_strange(function: Any) -> bool:
    if foreign_function(function) is not None:
        return True
    kind = type(function)
    return not isinstance(function, types.FunctionType) and not is_of_library(kind.__module__)
