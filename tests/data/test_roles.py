import pytest

from dpo_cache.data.roles import known_roles, standard_role


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("user", "user"),
        ("human", "user"),
        ("User", "user"),
        (" prompter ", "user"),
        ("gpt", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
        ("AI", "assistant"),
        ("system", "system"),
        ("SYSTEM", "system"),
        ("observation", "tool"),
        ("function", "tool"),
        ("ipython", "tool"),
        ("developer", "developer"),
        ("function_call", "function_call"),
        ("critic", None),
        ("", None),
    ],
)
def test_each_name_has_its_role(name: str, role: str | None) -> None:
    assert standard_role(name) == role
    assert role is None or name.strip().lower() in known_roles().split(", ")
