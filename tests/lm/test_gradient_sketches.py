"""A sketch has the norm of any difference of gradients, whatever the shape."""

import pytest
import torch

from dpo_cache.lm.gradient_sketches import NUM_DIRECTIONS, GradientSketches

SHAPES = {"matrix": (40, 300), "row": (1, 300), "experts": (3, 20, 50), "vector": (70,), "scalar": ()}


def sketches(gradients: dict[str, torch.Tensor]) -> GradientSketches:
    found = GradientSketches()
    for name, gradient in gradients.items():
        found.add(name, gradient)
    return found


def random_gradients() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    return {name: one / one.norm() for name, one in found.items()}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_that_differs_shows(name: str, dtype: torch.dtype) -> None:
    """By a hundredth of the gradient's norm; sums over rows and columns of such a change may be 0."""
    gradients = {key: one.to(dtype) for key, one in random_gradients().items()}
    changed = {key: one.clone().float() for key, one in gradients.items()}
    flat = changed[name].view(-1)
    flat[0] += 0.01 * flat.norm()
    flat[-1] -= 0.01 * flat.norm() * (flat.numel() > 1)
    assert sketches(gradients).problem(sketches(gradients), is_fp32=True) == ""
    assert sketches(changed).problem(sketches(gradients), is_fp32=True).startswith(f"{name}: by ")


def test_norms_are_estimated_and_terms_add_up() -> None:
    gradient = torch.randn(500, 256)
    whole, parts = sketches({"a": gradient}), sketches({"a": gradient - 1})
    parts.add("a", torch.ones_like(gradient))
    assert whole.by_name["a"].shape == (500, NUM_DIRECTIONS)
    assert float(whole.by_name["a"].norm()) == pytest.approx(float(gradient.norm()), rel=0.1)
    torch.testing.assert_close(parts.by_name["a"], whole.by_name["a"], rtol=1e-4, atol=1e-4)


def test_missing_ones_and_ones_too_many_show() -> None:
    gradients = random_gradients()
    without = {name: one for name, one in gradients.items() if name != "row"}
    doubled = {**gradients, "experts": 2 * gradients["experts"]}
    broken = {**gradients, "vector": gradients["vector"] * torch.nan}
    expected = sketches(gradients)
    assert sketches(without).problem(expected, is_fp32=True).startswith("row: by ")
    assert expected.problem(sketches(without), is_fp32=True).startswith("row: by ")
    assert sketches(doubled).problem(expected, is_fp32=False).startswith("experts: by ")
    assert sketches(broken).problem(expected, is_fp32=False).startswith("vector: by nan")


def test_a_gradient_is_taken_from_its_parameter() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    found = GradientSketches()
    found.take("a", parameter)
    assert not found.by_name
    parameter.sum().backward()
    found.take("a", parameter)
    assert parameter.grad is None and found.by_name["a"].shape == (2, NUM_DIRECTIONS)
