"""Step zero in 16 bits: noise on the weights is caught, and honest rounding is not.

The models are tiny and random, with weights of four spreads: some amplify rounding, some hardly do.
"""

import numpy as np
import pytest
import torch

from dpo_cache.errors import StepZeroError
from dpo_cache.lm.own_forward import own_logps
from dpo_cache.lm.rows import row_logps
from dpo_cache.training.step_zero import Expectation, StepZero
from dpo_cache.types import Completion, GapSums, Score
from tests.conftest import make_llama

SPREADS = (0.3, 0.1, 0.05, 0.02)
NOISE = {"bfloat16": 0.02, "float16": 0.0025}  # of each tensor's spread
Logps = list[np.ndarray]

each_dtype = pytest.mark.parametrize("dtype", NOISE)


def make_pairs(seed: int, num_pairs: int = 16) -> list[Completion]:
    generator = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return generator.integers(0, 264, length).astype(np.uint32)

    prompts = [ids(int(generator.integers(5, 30))) for _ in range(num_pairs)]
    return [Completion(prompt, ids(int(generator.integers(5, 40)))) for prompt in prompts for _ in range(2)]


def score(model: torch.nn.Module, completions: list[Completion]) -> Logps:
    return [own_logps(model, completion).numpy() for completion in completions]


def score_padded(model: torch.nn.Module, completions: list[Completion]) -> Logps:
    """In one padded batch: other shapes, so other rounding."""
    with torch.no_grad():
        return [logps.float().numpy() for logps in row_logps(model, completions)]


def make_noisy(seed: int, noise: float, dtype: str = "bfloat16") -> torch.nn.Module:
    model = make_llama(seed, initializer_range=SPREADS[seed % 4])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * noise * weight.std())
    return model.to(getattr(torch, dtype))


def is_refused(policy: Logps, cached: Logps, dtype: str, reference_dtype: str) -> bool:
    step_zero = StepZero(Expectation(dtype, reference_dtype, True))
    step_zero.check(policy, [*map(Score, cached)], [*range(len(cached))])
    try:
        step_zero.conclude()
    except StepZeroError:
        return True
    return False


def alarms_of_honest_runs(seed: int, dtype: str) -> int:
    """Of two runs: a reference scored in float32, and one scored in other batches."""
    completions = make_pairs(seed)
    model = make_llama(seed, initializer_range=SPREADS[seed % 4])
    exact = score(model, completions)
    policy = score(model.to(getattr(torch, dtype)), completions)
    padded = score_padded(model, completions)
    return is_refused(policy, exact, dtype, "float32") + is_refused(policy, padded, dtype, dtype)


def noise_is_caught(seed: int, dtype: str) -> bool:
    completions = make_pairs(seed)
    model = make_llama(seed, initializer_range=SPREADS[seed % 4])
    noisy = make_noisy(seed, NOISE[dtype], dtype)
    return is_refused(score(noisy, completions), score(model, completions), dtype, "float32")


@pytest.mark.rotating(2)
@each_dtype
@pytest.mark.parametrize("seed", range(4))
def test_noise_is_caught_and_rounding_is_not(seed: int, dtype: str) -> None:
    assert noise_is_caught(seed, dtype) and alarms_of_honest_runs(seed, dtype) == 0


@pytest.mark.slow
@each_dtype
def test_noise_is_caught_for_at_least_thirty_of_thirty_two_seeds(dtype: str) -> None:
    assert sum(noise_is_caught(seed, dtype) for seed in range(32)) >= 30


@pytest.mark.slow
@each_dtype
def test_two_hundred_honest_runs_raise_no_alarm(dtype: str) -> None:
    assert sum(alarms_of_honest_runs(seed, dtype) for seed in range(100)) == 0


def test_the_message_says_how_the_tokens_differ() -> None:
    completions = make_pairs(3)
    step_zero = StepZero(Expectation("bfloat16", "float32", True))
    exact = score(make_llama(3, initializer_range=0.02), completions)
    rows = [*range(len(completions))]
    step_zero.check(score(make_noisy(3, 0.04), completions), [*map(Score, exact)], rows)
    with pytest.raises(StepZeroError) as caught:
        step_zero.conclude()
    message = str(caught.value)
    assert "the policy is the reference, but its token log-probs differ from the cache's by 0.00" in message
    assert "nats (root mean square), where rounding in bfloat16 explains 0.002" in message
    assert "Likely cause: dtype or quantization: all tokens differ a little" in message


def sums_of(gaps: np.ndarray, logps: np.ndarray) -> GapSums:
    sums = GapSums()
    for start in range(0, len(gaps), 100):
        sums.add(gaps[start : start + 100], logps[start : start + 100])
    return sums


def test_a_shift_that_no_single_token_shows_is_found_by_its_mean() -> None:
    generator = np.random.default_rng(0)
    logps, rounding = generator.normal(-2, 2, 5000), generator.normal(0, 0.02, 5000)
    assert sums_of(rounding, logps).problem("bfloat16") == ""
    assert sums_of(rounding + 0.03, logps).problem("bfloat16") == (
        "+0.03 nats on average, where rounding in bfloat16 explains 0.014"
    )
    assert "root mean square" in sums_of(rounding + 0.1, logps).problem("bfloat16")


@pytest.mark.parametrize(
    ("num", "dtype", "is_found"), [(63, "bfloat16", False), (64, "bfloat16", True), (64, "float32", False)]
)
def test_few_tokens_and_other_dtypes_have_no_limit_together(num: int, dtype: str, is_found: bool) -> None:
    logps = np.random.default_rng(0).normal(-2, 2, num)
    assert bool(sums_of(np.full(num, 0.3), logps).problem(dtype)) is is_found


def test_gaps_that_are_no_numbers_are_a_problem() -> None:
    logps = np.random.default_rng(0).normal(-2, 2, 100)
    assert sums_of(np.full(100, np.nan), logps).problem("bfloat16")


# -- values of other programs --------------------------------------------------------------------------------


def is_stopped(gaps: np.ndarray, exact: np.ndarray, **known: bool) -> bool:
    expectation = Expectation("bfloat16", "bfloat16", False, imported="elsewhere", **known)
    step_zero = StepZero(expectation)
    step_zero.check([exact + gaps], [Score(exact)], [0])
    try:
        step_zero.conclude()
    except StepZeroError as error:
        assert "but its token log-probs differ from the cache's by 0.05" in str(error)
        assert "nats (root mean square)" in str(error)
        return True
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_imported_values_of_the_named_model_have_the_limit_unless_they_were_rounded(
    dtype: torch.dtype,
) -> None:
    generator = np.random.default_rng(0)
    values = torch.from_numpy(generator.normal(-5, 0.5, 300).astype(np.float32)).to(dtype).float().numpy()
    gaps = generator.normal(0, 0.051, 300).astype(np.float32)
    assert is_stopped(gaps, values, is_named=True) is (dtype == torch.float32)
    assert not is_stopped(gaps, values), "another model is expected to differ"
    assert not is_stopped(gaps / 50, values, is_named=True)
