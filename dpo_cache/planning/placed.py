"""The memory of a training step under a placement, on the device and on the host.

Running passes are counted on fake tensors (`plain_step.py`, `layer_major.py`); stored tensors are arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.lm.layerwise.ends import tables_of
from dpo_cache.lm.layerwise.frozen_tables import frozen_tables
from dpo_cache.lm.memory.recompute import decoder_layers
from dpo_cache.options.placement import Placement
from dpo_cache.planning.few_layers import are_alike
from dpo_cache.planning.footprint import QUANTIZED_BYTES, build_fake, quantizable
from dpo_cache.planning.layer_major import PhasePeaks, phase_peaks
from dpo_cache.planning.optimizer import optimizer_bytes, stream_bytes, update_bytes
from dpo_cache.planning.parts import Method, Parts
from dpo_cache.planning.plain_step import passes_peak
from dpo_cache.types import Completion

RING_SLOTS = 2  # layers on the device at once, where weights are fetched: one in use, one arriving


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a model's tensors."""

    weights: int  # all parameters, as they are loaded
    trained: int  # the trained parameters; their gradients take as much
    optimizer: int
    native_optimizer: int  # state of an optimizer that runs on the weights themselves, in their dtype
    second_model: int  # a live reference; 0 where it is the same model without its adapter
    layers: int  # copies on the device of all layers
    largest_layer: int
    table: int  # copy of the embeddings' table
    frozen_tables: int  # tables of embeddings that are only looked up in, which may be on the host
    head: int  # 0 if the head is the table
    head_copy: int  # copy on the device, while the head runs
    rest: int  # copies of everything else
    dequantized: int  # the largest quantized weight, whole
    layer_gradients: int  # gradients of the layer with the most
    num_layers: int
    alike: bool
    update: int  # temporary values of an update whose values and state are on the device
    streamed_update: int  # the same if values and state are on the host, and slices pass through the device
    slices: int  # the buffers of these slices, on the host


def measure_model(config: PreTrainedConfig, method: Method) -> ModelBytes:
    """The sizes of a model of this config; with optimizer none, nothing is updated. Takes a second, and
    hardly any memory.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_fake(config, method.dtype, lora_r=method.lora_r, lora_targets=method.lora_targets)
        if method.optimizer == "none":
            model.requires_grad_(requires_grad=False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        quantized = {id(layer.weight) for layer in quantizable(model)} if method.quantize else set()
        copies = _CopySizes(method, quantized)
        modules = decoder_layers(model)
        layers = [copies.of(layer.parameters()) for layer in modules]
        table, head = _weight(model.get_input_embeddings()), _weight(model.get_output_embeddings())
        elsewhere = [*modules, *tables_of(model, {*modules})]
        moving = {id(head)} | {id(one) for module in elsewhere for one in module.parameters()}
        rest = [one for one in model.parameters() if id(one) not in moving]
        return ModelBytes(
            weights=sum(copies.loaded(one) for one in model.parameters()),
            trained=_bytes(trained),
            optimizer=optimizer_bytes(trained, method.optimizer, method.rounding),
            native_optimizer=optimizer_bytes(trained, method.optimizer, None),
            second_model=0 if method.lora_r is not None else sum(map(copies.loaded, model.parameters())),
            layers=sum(layers),
            largest_layer=max(layers, default=0),
            table=0 if table is None else table.nbytes,
            frozen_tables=sum(_bytes(one.parameters()) for one in frozen_tables(model, {*modules})),
            head=0 if head is None or head is table else head.nbytes,
            head_copy=0 if head is None else copies.of([head]),
            rest=copies.of(rest),
            dequantized=max((_bytes([one.weight]) for one in quantizable(model)), default=0)
            if method.quantize
            else 0,
            layer_gradients=max(
                (_bytes(one for one in layer.parameters() if one.requires_grad) for layer in modules),
                default=0,
            ),
            num_layers=len(layers),
            alike=are_alike(model),
            update=update_bytes(trained, method.optimizer, method.rounding),
            streamed_update=update_bytes(trained, method.optimizer, method.rounding, is_streamed=True),
            slices=stream_bytes(trained, method.optimizer, method.rounding),
        )


def placed_footprint(
    config: PreTrainedConfig,
    method: Method,
    placement: Placement,
    forests: Sequence[Sequence[Completion]],
    *,
    recomputation: str = "cheap",
    device_type: str = "cuda",
) -> tuple[Parts, Parts]:
    """The parts of a step's peak on the device and on the host, over these forests, largest first.

    `recomputation` is `gradient_checkpointing` of a step that is not layer-major. Raises
    `NotLayerMajorError` for a model that cannot run layer by layer.
    """
    sizes = measure_model(config, method)
    if not placement.is_layer_major:
        peak = passes_peak(
            config,
            method,
            forests,
            recomputation=recomputation,
            alike=sizes.alike,
            gradients=sizes.trained,
            device_type=device_type,
        )
        return plain_parts(sizes, peak), Parts()
    peaks = phase_peaks(config, method, forests, alike=sizes.alike, device_type=device_type)
    return placed_parts(sizes, peaks, placement_there(placement, device_type), forests, method)


def placement_there(placement: Placement, device_type: str) -> Placement:
    """The placement on a device of this type: a CPU has only one memory, in which nothing moves."""
    if device_type != "cpu":
        return placement
    gradients = "none" if placement.gradients == "none" else "device"
    return replace(placement, weights="device", gradients=gradients, optimizer="device", inputs="device")


def plain_parts(sizes: ModelBytes, peak: int) -> Parts:
    """The device's parts of a step that is not layer-major; `peak` is that of `passes_peak`."""
    return Parts(
        weights=sizes.weights,
        gradients=sizes.trained,
        optimizer=sizes.optimizer,
        buffers=sizes.dequantized,
        activations=max(0, peak - sizes.trained),
        update=sizes.update,
    )


def live_reference_parts(sizes: ModelBytes, peak: int) -> Parts:
    """The device's parts of DPO with a live reference; `peak` is that of `live_reference_peak`."""
    return Parts(
        weights=sizes.weights + sizes.second_model,
        gradients=sizes.trained,
        optimizer=sizes.native_optimizer,
        buffers=sizes.dequantized,
        activations=peak,
    )


def placed_parts(
    sizes: ModelBytes,
    peaks: PhasePeaks,
    placement: Placement,
    forests: Sequence[Sequence[Completion]],
    method: Method,
) -> tuple[Parts, Parts]:
    """The parts of a layer-major step on the device and on the host, from its counted peaks."""
    inputs = waiting_inputs(sizes, peaks, forests)
    return _on_device(sizes, peaks, placement, inputs, method), _on_host(sizes, placement, inputs, method)


def waiting_inputs(sizes: ModelBytes, peaks: PhasePeaks, forests: Sequence[Sequence[Completion]]) -> int:
    """Bytes of the hidden states of all forests before each layer and after the last."""
    counts = [count_forest_tokens(forest) for forest in forests]
    return round(peaks.state * sum(counts) / max(counts)) * (sizes.num_layers + 1)


def tables_on_host(sizes: ModelBytes, placement: Placement) -> int:
    """Bytes of frozen tables of embeddings that are on the host, though the layers are on the device."""
    is_home = placement.optimizer == "device" and placement.weights == "device"
    is_apart = is_home and placement.is_layer_major and placement.inputs == "host"
    return sizes.frozen_tables if is_apart else 0


def _on_device(
    sizes: ModelBytes, peaks: PhasePeaks, placement: Placement, inputs: int, method: Method
) -> Parts:
    """The device's parts in the phase with the highest peak."""
    is_home = placement.optimizer == "device" and placement.weights == "device"
    gradients = sizes.trained if placement.gradients == "device" else 0
    standing = Parts(
        weights=sizes.weights - tables_on_host(sizes, placement) if is_home else sizes.rest,
        optimizer=sizes.optimizer if placement.optimizer == "device" else 0,
        inputs=inputs if placement.inputs == "device" else 0,
        buffers=sizes.dequantized,
        update=sizes.update if placement.optimizer == "device" else sizes.streamed_update,
    )
    if not is_home and placement.weights == "device":
        standing = replace(standing, weights=standing.weights + sizes.layers)
    elif not is_home:
        ring = RING_SLOTS * sizes.largest_layer
        standing = replace(standing, buffers=standing.buffers + ring)
    head = 0 if is_home else sizes.head_copy
    # a rounded copy adds its gradient to the float32 one in place; a plain step, as counted, makes another
    is_rounded = not is_home and method.lora_r is None and method.dtype != method.compute_dtype
    top = peaks.top - ((sizes.head or sizes.table) if is_rounded else 0)
    stays = is_home and placement.gradients != "device"  # gradients of bottom and top, until the pass ends
    top_gradients = min(sizes.trained, sizes.head or sizes.table) if stays else 0
    phases = [
        replace(standing, activations=peaks.forward),
        replace(standing, activations=top, buffers=standing.buffers + head),
        replace(
            standing,
            activations=max(0, peaks.backward - (sizes.layer_gradients if gradients else 0)),
            gradients=gradients or top_gradients,
        ),
    ]
    if is_home:
        phases.append(
            replace(
                standing,
                activations=max(0, peaks.bottom - (min(sizes.table, sizes.trained) if gradients else 0)),
                gradients=gradients or top_gradients,
            )
        )
    return max(phases, key=lambda one: (one.total, one.inputs + one.buffers + one.activations))


def _on_host(sizes: ModelBytes, placement: Placement, inputs: int, method: Method) -> Parts:
    frozen = sizes.weights - sizes.trained
    waits_here = placement.weights == "host"
    weights = (sizes.trained if placement.optimizer == "host" else 0) + (frozen if waits_here else 0)
    if method.lora_r is None and waits_here:
        weights = sizes.weights
    weights += tables_on_host(sizes, placement)
    rings = RING_SLOTS * sizes.largest_layer if placement.weights != "device" else 0
    slices = sizes.slices if placement.optimizer == "host" else 0
    return Parts(
        weights=weights,
        gradients=sizes.trained if placement.gradients == "host" else 0,
        optimizer=sizes.optimizer if placement.optimizer == "host" else 0,
        inputs=inputs if placement.inputs == "host" else 0,
        buffers=rings + slices,
    )


class _CopySizes:
    """Bytes of parameters as they are loaded, and of their copies on the device."""

    def __init__(self, method: Method, quantized: set[int]):
        self._method, self._quantized = method, quantized

    def loaded(self, parameter: torch.nn.Parameter) -> int:
        if id(parameter) in self._quantized:
            return round(QUANTIZED_BYTES[str(self._method.quantize)] * parameter.numel())
        return parameter.nbytes

    def of(self, parameters: Iterable[torch.nn.Parameter]) -> int:
        """Bytes of the parameters' copies; float32 matrices are copied in the dtype of mixed precision."""
        return sum(self._copy(one) for one in parameters)

    def _copy(self, parameter: torch.nn.Parameter) -> int:
        is_halved = (
            self._method.precision == "bf16-mixed"
            and parameter.dtype == torch.float32
            and parameter.ndim > 1
            and self._method.lora_r is None
        )
        return parameter.nbytes // 2 if is_halved else self.loaded(parameter)


def _weight(module: object) -> torch.nn.Parameter | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, torch.nn.Parameter) else None


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
