"""LoRA goes on every linear layer that can take it, and on no other."""

import pytest
import torch
from peft import LoraConfig

from dpo_cache.errors import OptionError
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.lm.model.lora_targets import is_linear_map, without_unsuited_layers
from tests.conftest import make_llama
from tests.lm.families import make_model


class Router(torch.nn.Linear):
    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(inputs).topk(1)


class ByGroups(torch.nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.einsum(
            "ngi,goi->ngo", inputs.view(-1, 2, self.in_features), self.weight.view(2, -1, self.in_features)
        )


class Doubled(torch.nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


def adapted_names(model: torch.nn.Module) -> set[str]:
    return {
        name.rpartition(".lora_A")[0].rpartition(".")[2]
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }


@pytest.mark.parametrize(
    ("kind", "is_linear"), [(torch.nn.Linear, True), (Doubled, True), (Router, False), (ByGroups, False)]
)
def test_a_linear_map_is_known_by_what_it_returns(kind: type[torch.nn.Linear], is_linear: bool) -> None:
    assert is_linear_map(kind(6, 4)) is is_linear


def test_a_plain_model_keeps_peft_s_own_choice() -> None:
    remarks: list[str] = []
    config = lora_config(4, None, "all-linear")
    assert without_unsuited_layers(make_llama(), config, remarks.append) is config
    assert not remarks


def test_routers_that_return_tuples_are_left_out_with_a_remark() -> None:
    model, remarks = make_model("llama4"), []
    add_adapter(model, lora_config(2, None, "all-linear"), seed=0, log=remarks.append)
    assert {"q_proj", "gate_proj"} <= adapted_names(model) and "router" not in adapted_names(model)
    assert remarks == [
        "`lora_targets` all-linear leaves out router in 2 places of Llama4ForCausalLM: LoRA cannot be added there."
    ]
    assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


def test_layers_that_peft_refuses_are_left_out() -> None:
    model, remarks = make_model("mamba2"), []
    add_adapter(model, lora_config(2, None, "all-linear"), seed=0, log=remarks.append)
    assert adapted_names(model) == {"in_proj"} and "out_proj" in remarks[0]


def test_a_router_by_name_is_an_error() -> None:
    with pytest.raises(
        OptionError, match=r"cannot take LoRA on model\.layers\.0\.\w+\.router: Llama4Router returns"
    ):
        add_adapter(make_model("llama4"), lora_config(2, None, "q_proj,router"), seed=0)
    add_adapter(
        make_model("llama4"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), seed=0
    )
