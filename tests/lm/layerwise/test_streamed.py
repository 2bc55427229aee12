"""Models whose layers' weights travel: the same bits, two layers on the device, and gradients in the copies."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dpo_cache.lm.layerwise.ends import tables_of
from dpo_cache.lm.layerwise.sources import HostWeights
from dpo_cache.lm.layerwise.streamed import PersistentCopies, StreamedWeights
from dpo_cache.lm.memory.recompute import decoder_layers
from tests.conftest import make_llama
from tests.families.tiny import make_tiny
from tests.lm.layerwise.transfers import FakeTransfer

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 200, 31, 7, 7, 64, 3]])
SIZES = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def make_qwen() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))


def make_mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def make_gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config)


FAMILIES = {
    "llama": lambda: make_llama(num_hidden_layers=4),
    "qwen2": make_qwen,
    "mixtral": make_mixtral,
    "gpt2": make_gpt2,
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_llama(num_hidden_layers=4)


def streamed(
    model: PreTrainedModel, transfer: FakeTransfer | None = None, **options: object
) -> StreamedWeights:
    return StreamedWeights(
        model, decoder_layers(model), HostWeights(), CPU, transfer=transfer or FakeTransfer(), **options
    )


@torch.no_grad()
def test_a_plain_call_gives_the_same_bits_and_holds_two_layers(model: PreTrainedModel) -> None:
    expected, before = model(IDS).logits, dict(model.named_parameters())
    transfer = FakeTransfer()
    with streamed(model, transfer) as weights:
        for _ in range(2):
            assert torch.equal(model(IDS).logits, expected)
        assert len(transfer.targets) == 2
        assert weights.ring.num_bytes == sum(transfer.sent)
        assert len(transfer.sent) == 4 + 4 + 1  # the first layer is fetched for a third call
    assert all(before[name] is one for name, one in model.named_parameters())
    assert torch.equal(model(IDS).logits, expected)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_layer_in_use_holds_copies_and_the_model_its_parameters(llama: PreTrainedModel) -> None:
    layer = decoder_layers(llama)[1]
    homes = dict(layer.named_parameters())
    with streamed(llama) as weights, weights.use(1, then=2):
        copies = dict(layer.named_parameters())
        assert copies.keys() == homes.keys()
        for name, home in homes.items():
            assert torch.equal(copies[name], home) and copies[name].data_ptr() != home.data_ptr()
            assert copies[name].stride() == home.stride()
        with weights.use(1):  # by the layer's own forward
            assert dict(layer.named_parameters()) == copies
    assert all(homes[name] is one for name, one in layer.named_parameters())


def test_the_homes_are_back_after_an_error(llama: PreTrainedModel) -> None:
    homes = dict(llama.named_parameters())
    with streamed(llama) as weights:
        with pytest.raises(ZeroDivisionError), weights.use(0, then=1):
            raise ZeroDivisionError
        assert all(homes[name] is one for name, one in llama.named_parameters())
        with weights.use(2, then=3):
            pass


def test_gradients_are_in_the_leaves_and_stay_until_they_are_collected(llama: PreTrainedModel) -> None:
    layer = decoder_layers(llama)[0]
    frozen = "model.layers.0.self_attn.q_proj.weight"
    llama.get_parameter(frozen).requires_grad_(False)
    inputs = torch.randn(1, 4, 32)
    position = llama.model.rotary_emb(inputs, torch.arange(4)[None])
    layer(inputs, position_embeddings=position).square().sum().backward()
    expected = {f"model.layers.0.{name}": one.grad for name, one in layer.named_parameters()}
    llama.zero_grad()
    with streamed(llama) as weights:
        for _ in range(2):
            with weights.use(0, then=1):
                layer(inputs, position_embeddings=position).square().sum().backward()
            with weights.use(2):
                pass
        leaves = weights.leaves(0)
        assert leaves.keys() == expected.keys() - {frozen}
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, 2 * expected[name])
            leaf.grad = None
        with weights.use(0):
            assert all(leaf.grad is None for leaf in weights.leaves(0).values())
        assert all(one.grad is None for one in llama.parameters())


def test_a_backward_pass_after_the_layer_is_left_is_an_error(llama: PreTrainedModel) -> None:
    """Its copies may hold other weights by then; a change of one copy in place is none of the others."""
    layer = llama.model.layers[0]
    state = torch.randn(1, 5, 32, requires_grad=True)
    with StreamedWeights(llama, llama.model.layers, HostWeights(), CPU, transfer=FakeTransfer()) as weights:
        with weights.use(0):
            products = layer.mlp(state).sum()
            copy = layer.self_attn.q_proj.weight
            torch.autograd.graph.increment_version(copy)
            products.backward()
            late = layer.mlp(state).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()


def test_changed_weights_are_fetched_again(llama: PreTrainedModel) -> None:
    weight = decoder_layers(llama)[1].mlp.up_proj
    with streamed(llama) as weights:
        for key in (1, None):
            with weights.use(0, then=1):
                pass
            with torch.no_grad():
                weight.weight += 1
            weights.refresh(key)
            home = weight.weight
            with weights.use(1):
                assert torch.equal(weight.weight, home)


@torch.no_grad()
def test_copies_for_mixed_precision_are_what_autocast_computes(model: PreTrainedModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(IDS).logits
    with (
        streamed(model, compute_dtype=torch.bfloat16) as weights,
        torch.autocast("cpu", torch.bfloat16),
    ):
        assert torch.equal(model(IDS).logits, expected)
        with weights.use(0):
            found = {name: one.dtype for name, one in decoder_layers(model)[0].named_parameters()}
    assert all(
        (dtype == torch.bfloat16) == (name.endswith("weight") and "norm" not in name and "ln_" not in name)
        for name, dtype in found.items()
        if "experts" not in name and not name.endswith("gate.weight")
    )


def test_nothing_travels_where_the_weights_are_on_the_device(llama: PreTrainedModel) -> None:
    weights = StreamedWeights(llama, decoder_layers(llama), HostWeights(), CPU)
    home = decoder_layers(llama)[0].mlp.up_proj.weight
    with weights.use(0, then=1):
        assert decoder_layers(llama)[0].mlp.up_proj.weight is home
    assert weights.ring.num_fetches == 0
    weights.close()


def test_a_layer_that_is_called_twice_has_one_slot(llama: PreTrainedModel) -> None:
    one, two = decoder_layers(llama)[:2]
    with StreamedWeights(llama, [one, two, one], HostWeights(), CPU, transfer=FakeTransfer()) as weights:
        with weights.use(0, then=1):
            pass
        with weights.use(1, then=2):
            pass
        with weights.use(2):
            assert weights.leaves(2).keys() == weights.leaves(0).keys()
        assert weights.ring.num_fetches == 2


def make_bart() -> PreTrainedModel:
    """Its second table is given tensors by name."""
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4}
    return BartForCausalLM(BartConfig(vocab_size=264, max_position_embeddings=264, is_decoder=True, **sizes))


@torch.no_grad()
def test_tables_with_other_arguments_are_read_on_the_host() -> None:
    model = make_bart().eval()
    expected = model(IDS, use_cache=False).logits
    with streamed(model, embedding="host"):
        assert torch.equal(model(IDS, use_cache=False).logits, expected)


def test_a_table_whose_weight_the_code_reads_itself_is_not_apart(llama: PreTrainedModel) -> None:
    assert tables_of(llama, {*decoder_layers(llama)}) == [llama.model.embed_tokens]
    model = make_tiny("gemma4")
    assert tables_of(model, {*decoder_layers(model)}) == []


@torch.no_grad()
def test_ends_on_the_host_give_the_same_bits(model: PreTrainedModel) -> None:
    expected = model(IDS).logits
    with streamed(model, embedding="host"):
        assert torch.equal(model(IDS).logits, expected)


def test_the_head_is_on_the_device_only_for_the_top_and_both_ends_have_leaves(llama: PreTrainedModel) -> None:
    table, head, norm = llama.model.embed_tokens, llama.lm_head, llama.model.norm
    homes = table.weight, head.weight, norm.weight
    with streamed(llama, embedding="host") as weights:
        with weights.use_bottom():
            assert head.weight is homes[1] and norm.weight is not homes[2]
            table(IDS).square().sum().backward()
        assert weights.leaves("bottom").keys() == {"model.norm.weight"}
        with weights.use_top():
            assert head.weight is not homes[1]
            head(norm(torch.ones(1, 32))).sum().backward()
        leaves = weights.leaves("top")
    assert homes == (table.weight, head.weight, norm.weight)
    assert leaves.keys() == {"model.norm.weight", "lm_head.weight"}
    assert all(leaf.grad is not None for leaf in leaves.values())
    torch.testing.assert_close(homes[0].grad[IDS[0, 0]], 2 * homes[0][IDS[0, 0]].detach())  # on the host
    assert homes[1].grad is None and homes[2].grad is None


def test_weights_of_the_ends_that_changed_are_sent_again(llama: PreTrainedModel) -> None:
    norm = llama.model.norm
    with streamed(llama) as weights:
        for key in ("top", None):
            with weights.use_top():
                pass
            with torch.no_grad():
                norm.weight += 1
            weights.refresh(key)
            home = norm.weight
            with weights.use_top():
                assert torch.equal(norm.weight, home)


@torch.no_grad()
def test_persistent_copies_are_sent_once_and_again_after_an_update(llama: PreTrainedModel) -> None:
    expected, transfer = llama(IDS).logits, FakeTransfer()
    layers = decoder_layers(llama)
    with PersistentCopies(llama, layers, HostWeights(), CPU, transfer=transfer) as weights:
        for _ in range(2):
            assert torch.equal(llama(IDS).logits, expected)
        assert len(transfer.sent) == len(transfer.targets) == 4
        layers[2].mlp.up_proj.weight.mul_(2)
        weights.refresh(2)
        changed = llama(IDS).logits
        assert len(transfer.sent) == 5 and len(transfer.targets) == 4
    assert torch.equal(llama(IDS).logits, changed) and not torch.equal(changed, expected)


@torch.no_grad()
def test_tables_that_a_module_makes_anew_stay() -> None:
    """Dynamic rotary embeddings grow with the longest row, and remember its length."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_llama(rope_parameters=rope, max_position_embeddings=16)
    rows = [torch.arange(length)[None] for length in (8, 40, 40, 8)]
    expected = [model(row).logits for row in rows]
    model = make_llama(rope_parameters=rope, max_position_embeddings=16)
    with streamed(model):
        for row, logits in zip(rows, expected, strict=True):
            assert torch.equal(model(row).logits, logits)
