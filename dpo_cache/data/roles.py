"""The role of a message under its many names."""

from __future__ import annotations

FUNCTION_CALL = "function_call"  # a turn of the assistant whose text is the JSON of tool calls

ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatbot", "ai", "chatgpt"),
    "system": ("system",),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "function_response"),
    "developer": ("developer",),  # chat templates decide what becomes of it
    FUNCTION_CALL: (FUNCTION_CALL, "tool_call"),
}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


def standard_role(name: str) -> str | None:
    """The role as chat templates name it, or `FUNCTION_CALL`; None for a name that is not known.

    Capital letters and spaces around the name do not count.
    """
    return _ROLE_OF.get(name) or _ROLE_OF.get(name.strip().lower())


def known_roles() -> str:
    """Every name, for an error message."""
    return ", ".join(_ROLE_OF)
