import pytest

from dpo_cache.training.output.markdown import code, plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("helpful/train", "`helpful/train`"),
        ("a`b", "`` a`b ``"),
        ("``` `x", "```` ``` `x ````"),
        ("<script>alert(1)</script>", "`<script>alert(1)</script>`"),
        ("a\n\n# heading", r"`a\n\n# heading`"),
        ("a|b", r"`a\x7cb`"),
        ("\x1b[2J", r"`\x1b[2J`"),
        (["list"], "`['list']`"),
        ("", "`-`"),
    ],
)
def test_a_code_span_cannot_be_left(text: object, shown: str) -> None:
    assert code(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("keep-start", "keep-start"),
        ("<img src=x onerror=y>", r"\<img src\=x onerror\=y\>"),
        ("[a](javascript:b)", r"\[a\]\(javascript\:b\)"),
        ("**b** `c` _d_", r"\*\*b\*\* \`c\` \_d\_"),
        ("www.evil.com", r"www\.evil\.com"),
        ("&lt;", r"\&lt\;"),
        ("a\n- b|c", r"a\\n- b\\x7cc"),
    ],
)
def test_plain_text_has_no_markup(text: str, shown: str) -> None:
    assert plain(text) == shown
