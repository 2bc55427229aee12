"""A checkpoint -> a causal LM whose layers' weights are on the host or on disk, and what streams them.

    model, weights = load_streamed(folder, dtype=torch.bfloat16, device=device, weights="disk")
    with weights:
        logits = model(ids).logits

The values are those of `load_model` to the bit. Under `disk` the layers have tensors without values (on the
meta device), and nothing but one layer and the next one is in memory. Weights in 4 or 8 bits are quantized
once, layer by layer on the device, and kept packed in host memory under `disk`, too.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model

from dpo_cache.errors import ModelError
from dpo_cache.lm.layerwise.conversion import Piece, find_pieces, pieces_by_layer
from dpo_cache.lm.layerwise.disk import disk_weights
from dpo_cache.lm.layerwise.ends import tables_of
from dpo_cache.lm.layerwise.held import held_directly, held_in
from dpo_cache.lm.layerwise.record import outermost_layers
from dpo_cache.lm.layerwise.sources import HostWeights
from dpo_cache.lm.layerwise.streamed import StreamedWeights
from dpo_cache.lm.layerwise.transfer import Transfer
from dpo_cache.lm.model.adapter import CheckpointLocation, locate_checkpoint
from dpo_cache.lm.model.adapter_weights import fit_vocabulary, load_adapter
from dpo_cache.lm.model.load import load_config, read_base
from dpo_cache.lm.model.parts import decoder_of
from dpo_cache.lm.model.quantization import is_quantized
from dpo_cache.lm.model.stored_tensors import StoredTensors
from dpo_cache.log import phase

LOADER_ARGUMENTS = ["model", "state_dict", "load_config", "disk_offload_index"]
PACKED = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")  # methods whose packed weights can travel


@phase("loading the model")
def load_streamed(
    location: str | CheckpointLocation,
    *,
    dtype: torch.dtype,
    device: torch.device,
    weights: str = "host",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: str = "none",
    compute_dtype: torch.dtype | None = None,
    embedding: str = "device",
    transfer: Transfer | None = None,
) -> tuple[PreTrainedModel, StreamedWeights]:
    """The model in eval mode, and its weights, which are to be closed after use. Raises `ModelError`.

    `weights` is host or disk. `embedding` device or host is where the table of embeddings and the LM head
    are; on the host, a table is read there, and the head is fetched when it runs. All else outside the
    layers is on the device, and so are the weights of an adapter. `compute_dtype` is the dtype in which mixed
    precision multiplies float32 weights, and 4-bit ones. See `load_model` for the rest.
    """
    parts = locate_checkpoint(location, revision) if isinstance(location, str) else location
    method = None if quantize != "none" else _saved_method(parts, trust_remote_code)
    found = list[tuple[StoredTensors, list[Piece]]]()
    with ExitStack() as opened:  # closed after an error
        if quantize != "none" or method is not None:
            load: Callable[..., Any] | None = _load_packed
        else:
            load = partial(_load_ends, found, opened) if weights == "disk" else None
        if load is not None:
            _check_transformers()
        with nullcontext() if load is None else _loading(load):
            model = read_base(
                parts,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                quantize=quantize,
                compute_dtype=compute_dtype,
            )
        if parts.adapter is not None:
            fit_vocabulary(model, parts.adapter)
        layers = _layers_of(model)
        _place_ends(model, set(layers), device, embedding)
        streamed = StreamedWeights(
            model,
            layers,
            disk_weights(model, *found[0]) if found else HostWeights(),
            device,
            compute_dtype=compute_dtype if dtype == torch.float32 and not is_quantized(model) else None,
            transfer=transfer,
            embedding=embedding,
        )
        opened.callback(streamed.close)
        if parts.adapter is not None:
            load_adapter(model, parts.adapter)
        opened.pop_all()
    return model, streamed


def _saved_method(parts: CheckpointLocation, trust_remote_code: bool) -> str | None:
    """The method of a checkpoint that was saved quantized. Raises `ModelError` if it cannot be used."""
    config = load_config(parts.base, revision=parts.base_revision, trust_remote_code=trust_remote_code)
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return None
    method = saved.get("quant_method") if isinstance(saved, dict) else saved.quant_method
    method = str(getattr(method, "value", method))
    if method not in PACKED:
        raise ModelError(
            f"{parts.base}: its weights were saved quantized ({method}), and such weights cannot be fetched "
            "layer by layer.\nKeep them on the device, or give the model that it was made from, with "
            "`quantize` if needed."
        )
    return method


def _check_transformers() -> None:
    """Raise `ModelError` where transformers loads weights by functions of another form than is known here."""
    form = [*inspect.signature(convert_and_load_state_dict_in_model).parameters]
    own = PreTrainedModel.__dict__.get("_load_pretrained_model")
    if form != LOADER_ARGUMENTS or not isinstance(own, staticmethod):
        raise ModelError(
            f"weights cannot be fetched layer by layer with transformers {transformers.__version__}: it "
            "loads them in another way than 5.24.\n"
            "Run `pip install transformers==5.24.0`, or keep the weights on the device."
        )


@contextmanager
def _loading(load: Callable[..., Any]) -> Iterator[None]:
    """While open, `from_pretrained` fills a model by this function in place of its own one."""
    own = PreTrainedModel.__dict__["_load_pretrained_model"]
    PreTrainedModel._load_pretrained_model = staticmethod(load)  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = own  # type: ignore[method-assign]


def _load_ends(
    found: list[tuple[StoredTensors, list[Piece]]],
    opened: ExitStack,
    model: PreTrainedModel,
    _: Any,
    files: list[str],
    config: Any,
) -> Any:
    """Load what is outside the layers; theirs stay without values, and `found` gets what makes them."""
    stored = StoredTensors([Path(file) for file in files])
    opened.callback(stored.close)
    names = _layer_names(model)
    pieces = find_pieces(model, copy.deepcopy(config.weight_mapping or []), stored.tensors)
    by_layer, _others = pieces_by_layer(model, pieces, names)
    in_layers = {name for layer in by_layer for piece in layer for name, _, _ in piece.sources}
    ends = {name: one for name, one in stored.tensors.items() if name not in in_layers}
    report = _load_some(model, ends, config)
    empty = {name: one.on_meta() for name, one in stored.tensors.items() if name in in_layers}
    _merge(report, _load_some(model, empty, _on_meta(config)))
    state = model.state_dict(keep_vars=True)
    for piece in pieces:
        piece.dtype = state[piece.target].dtype if piece.target in state else piece.dtype
    found.append((stored, [piece for layer in by_layer for piece in layer]))
    return report, None


def _load_packed(model: PreTrainedModel, _: Any, files: list[str], config: Any) -> Any:
    """Load and quantize layer by layer on the device; each one's packed weights move to the host."""
    with closing(StoredTensors([Path(file) for file in files])) as stored:
        pieces = find_pieces(model, copy.deepcopy(config.weight_mapping or []), stored.tensors)
        by_layer, _others = pieces_by_layer(model, pieces, _layer_names(model), converts=False)
        in_layers = {name for layer in by_layer for piece in layer for name, _, _ in piece.sources}
        ends = {name: one for name, one in stored.tensors.items() if name not in in_layers}
        report = _load_some(model, ends, config)
        for layer, layer_pieces in zip(_layers_of(model), by_layer, strict=True):
            content = {name: one for piece in layer_pieces for name, _, one in piece.sources}
            _merge(report, _load_some(model, content, config))
            _move(layer, torch.device("cpu"))
    return report, None


def _on_meta(config: Any) -> Any:
    """The config of a load of tensors without values."""
    mapping = copy.deepcopy(config.weight_mapping or [])
    for entry in mapping:
        if getattr(entry, "force_cpu", False):
            entry.force_cpu = False
    return replace(config, device_map={"": "meta"}, weight_mapping=mapping)


def _load_some(model: PreTrainedModel, content: dict[str, Any], config: Any) -> Any:
    """Load these tensors; returns transformers' report, in which all others are missing."""
    report, _ = convert_and_load_state_dict_in_model(
        model=model, state_dict=content, load_config=config, disk_offload_index=None
    )
    return report


def _merge(report: Any, other: Any) -> None:
    """Let a report on a part of the weights be one on another part, too."""
    report.missing_keys &= other.missing_keys
    report.unexpected_keys |= other.unexpected_keys
    report.mismatched_keys |= other.mismatched_keys
    report.conversion_errors |= other.conversion_errors
    report.error_msgs += other.error_msgs


def _layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    decoder = decoder_of(model)
    layers = outermost_layers(decoder)
    if not layers:
        raise ModelError(
            f"{type(decoder).__name__} has no layers that can be recognised, so that its weights cannot be "
            "fetched layer by layer.\nKeep them on the device."
        )
    return list[torch.nn.Module](layers)


def _layer_names(model: PreTrainedModel) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[layer] for layer in _layers_of(model)]


def _move(module: torch.nn.Module, device: torch.device) -> None:
    """Move a module's tensors; quantized ones stay as they are packed. The same memory stays the same."""
    for one in module.modules():
        if hasattr(one, "init_8bit_state") and getattr(one.weight, "CB", None) is not None:
            one.init_8bit_state()  # type: ignore[operator]  # its tensors have one owner from now on
    moved: dict[int, torch.Tensor] = {}
    for held in held_in(module, ""):
        tensor = held.tensor
        if tensor.device != device and not tensor.is_meta:
            held.move(moved.setdefault(tensor.data_ptr(), tensor.data.to(device)))


def _place_ends(
    model: PreTrainedModel, layers: set[torch.nn.Module], device: torch.device, embedding: str
) -> None:
    """Move what is outside the layers to the device; with `embedding` host, tables and head to it."""
    inner = {module for layer in layers for module in layer.modules()}
    ends = [held for module in model.modules() if module not in inner for held in held_directly(module, "")]
    apart = [*tables_of(model, layers), model.get_output_embeddings()] if embedding == "host" else []
    on_host = {id(held.tensor) for module in apart if module is not None for held in held_in(module, "")}
    for held in ends:
        place = torch.device("cpu") if id(held.tensor) in on_host else device
        if held.tensor.device != place:
            held.move(held.tensor.data.to(place))
