"""Models whose layers are read from the host or from disk: the same bits as when they are resident."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError
from dpo_cache.lm.device import check_one_device
from dpo_cache.lm.layerwise.streamed import StreamedWeights
from dpo_cache.lm.layerwise.weights import ResidentWeights
from dpo_cache.lm.memory.recompute import decoder_layers
from dpo_cache.lm.model import load_streamed as load_streamed_module
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.lm.model.load import load_model
from dpo_cache.lm.model.load_streamed import load_streamed
from dpo_cache.lm.patches import without_patches
from dpo_cache.lm.prepare import prepared
from tests.conftest import make_llama
from tests.lm.layerwise.test_streamed import FAMILIES, IDS
from tests.lm.layerwise.transfers import FakeTransfer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    for name, make in FAMILIES.items():
        make().save_pretrained(folder / name, max_shard_size="60KB")
    return {name: folder / name for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> str:
    return str(folders[request.param])


def resident(folder: str, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
    return load_model(folder, dtype=dtype, device=CPU, **options)


@pytest.mark.rotating(3)
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_logits_are_those_of_the_resident_model(folder: str, place: str, dtype: torch.dtype) -> None:
    expected = resident(folder, dtype)(IDS).logits
    transfer = FakeTransfer()
    model, weights = load_streamed(folder, dtype=dtype, device=CPU, weights=place, transfer=transfer)
    assert model.device == CPU and model.dtype == dtype and not model.training
    check_one_device(model)
    with weights:
        for _ in range(2):
            assert torch.equal(model(IDS).logits, expected)
    assert len(transfer.targets) == 2 and len(transfer.sent) == 9
    is_empty = {one.is_meta for layer in decoder_layers(model) for one in layer.parameters()}
    assert is_empty == {place == "disk"}


def test_bytes_that_are_read_are_those_of_the_layers(folders: dict[str, Path]) -> None:
    folder = folders["llama"]
    stored = {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}
    in_layers = sum(one.nbytes for name, one in stored.items() if ".layers." in name)
    _model, weights = load_streamed(str(folder), dtype=torch.float32, device=CPU, weights="disk")
    with weights, torch.no_grad():
        before = weights.source.num_bytes_read
        assert before == sum(one.nbytes for one in stored.values()) - in_layers
        for index in range(4):
            with weights.use(index, then=min(index + 1, 3)):
                pass
        assert weights.source.num_bytes_read - before == in_layers


def rewrite_tensors(folder: Path, change) -> None:
    """Change the tensors of a checkpoint of one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def drop_weight(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def reshape_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_weight, r"1 weights are not in the checkpoint .*layers\.1\.mlp\.up_proj"),
        (reshape_weight, "no causal LM"),
    ],
)
@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_layer_without_a_weight_is_refused(tmp_path: Path, place: str, change, message: str) -> None:
    make_llama().save_pretrained(tmp_path)
    rewrite_tensors(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        load_streamed(str(tmp_path), dtype=torch.float32, device=CPU, weights=place)


@pytest.mark.rotating(2)
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_quantized_weights_travel_packed(folders: dict[str, Path], place: str, quantize: str) -> None:
    pytest.importorskip("bitsandbytes")
    options = {"dtype": torch.float32, "device": CPU, "quantize": quantize}
    model = load_model(str(folders["llama"]), **options)
    expected = model(IDS).logits
    transfer = FakeTransfer()
    model, weights = load_streamed(str(folders["llama"]), weights=place, transfer=transfer, **options)
    plain = sum(one.numel() for one in decoder_layers(make_llama())[0].parameters())
    with weights, torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(IDS).logits, expected)
        assert len(transfer.targets) == 2 and len(transfer.sent) == 9
    padding = 512 * 50
    assert max(transfer.sent) < plain * (0.6 if quantize == "4bit" else 1.1) + padding
    assert torch.equal(model(IDS).logits, expected)


def test_weights_that_were_saved_in_4_bits_travel_as_they_are(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    load_model(str(folders["llama"]), dtype=torch.float32, device=CPU, quantize="4bit").save_pretrained(
        tmp_path
    )
    expected = resident(str(tmp_path))(IDS).logits
    model, weights = load_streamed(
        str(tmp_path), dtype=torch.float32, device=CPU, weights="disk", transfer=FakeTransfer()
    )
    with weights, torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


def test_other_quantized_formats_are_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folders["llama"] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"saved quantized \(fp8\).*layer by layer"):
        load_streamed(str(tmp_path), dtype=torch.float32, device=CPU, weights="disk")


@pytest.mark.parametrize(("place", "is_refused"), [("disk", True), ("host", False)])
def test_a_transformers_that_loads_otherwise_is_refused_where_that_matters(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, place: str, is_refused: bool
) -> None:
    monkeypatch.setattr(load_streamed_module, "LOADER_ARGUMENTS", ["model", "state_dict", "tp_plan"])
    options = {"dtype": torch.float32, "device": CPU, "weights": place}
    with pytest.raises(ModelError, match="another way than 5.24") if is_refused else nullcontext():
        load_streamed(str(folders["llama"]), **options)[1].close()


def trained(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


@pytest.mark.parametrize("place", ["host", "disk"])
def test_an_adapter_starts_and_computes_as_on_a_resident_base(
    folders: dict[str, Path], tmp_path: Path, place: str
) -> None:
    folder, lora = str(folders["llama"]), lora_config(4, 8, "all-linear")
    model = resident(folder)
    adapted = add_adapter(model, lora, seed=3)
    start = {name: one.detach().clone() for name, one in trained(model).items()}
    with torch.no_grad():
        for one in trained(model).values():
            one.add_(0.02)
    expected = model(IDS).logits
    adapted.save_pretrained(tmp_path)
    model, weights = load_streamed(folder, dtype=torch.float32, device=CPU, weights=place)
    with weights, torch.no_grad():
        add_adapter(model, lora, seed=3)
        found = trained(model)
        assert found.keys() == start.keys()
        for name, one in found.items():
            assert torch.equal(one, start[name])
            one.add_(0.02)
        assert torch.equal(model(IDS).logits, expected)
        with weights.use(1):
            assert weights.leaves(1) == {}  # adapters stay on the device
    model, weights = load_streamed(str(tmp_path), dtype=torch.float32, device=CPU, weights=place)
    with weights, torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}]
)
def test_an_adapter_that_starts_from_weights_on_disk_is_refused(
    folders: dict[str, Path], changes: dict[str, object]
) -> None:
    lora = lora_config(4, 8, "all-linear")
    for name, value in changes.items():
        setattr(lora, name, value)
    model, weights = load_streamed(str(folders["llama"]), dtype=torch.float32, device=CPU, weights="disk")
    with (
        weights,
        pytest.raises(ModelError, match="starts from the weights under it, which are not in memory"),
    ):
        add_adapter(model, lora, seed=0)


def test_an_adapter_trains_through_frozen_weights_that_travel(folders: dict[str, Path]) -> None:
    folder, lora = str(folders["llama"]), lora_config(4, 8, "all-linear")
    inputs, position = torch.randn(1, 4, 32), torch.arange(4)[None]
    grads = []
    for place in ("device", "disk"):
        if place == "device":
            model, weights = resident(folder), ResidentWeights()
        else:
            model, weights = load_streamed(folder, dtype=torch.float32, device=CPU, weights=place)
        add_adapter(model, lora, seed=3)
        rotary = model.model.rotary_emb(inputs, position)
        with weights.use(2):
            decoder_layers(model)[2](inputs, position_embeddings=rotary).square().sum().backward()
        grads.append({name: one.grad for name, one in trained(model).items() if one.grad is not None})
        if isinstance(weights, StreamedWeights):
            weights.close()
    assert len(grads[0]) == 14 and grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_generation_reads_the_layers_for_each_token(folders: dict[str, Path]) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = resident(str(folders["qwen2"])).generate(IDS, **options)
    model, weights = load_streamed(str(folders["qwen2"]), dtype=torch.float32, device=CPU, weights="disk")
    with weights:
        assert torch.equal(model.generate(IDS, **options), expected)
        assert weights.ring.num_fetches == 3 * 4 + 1


def test_layers_and_linear_kernels_can_be_patched_and_unpatched(folders: dict[str, Path]) -> None:
    expected = resident(str(folders["llama"]))(IDS).logits
    model, weights = load_streamed(str(folders["llama"]), dtype=torch.float32, device=CPU, weights="disk")
    with weights, torch.no_grad(), prepared(model):
        torch.testing.assert_close(model(IDS).logits, expected)
        with without_patches(model):
            assert torch.equal(model(IDS).logits, expected)
