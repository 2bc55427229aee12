"""What a shell is offered after a word, as its script asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.store.caches import make_cache


def completed(cwd: Path, line: str) -> list[str]:
    """The values that bash is offered at the end of the line."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_DPO_CACHE_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", "from dpo_cache.cli.app import main; main()"],
        env={**os.environ, **words},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dpo-cache tra", ["train"]),
        ("dpo-cache train cache --loss simp", ["simpo"]),
        ("dpo-cache train cache --memory ", ["auto", "fast", "small", "least"]),
        ("dpo-cache train cache --eval-p", ["--eval-pairs"]),
        ("dpo-cache train --cache cache --pairs ", ["demo/train"]),
        ("dpo-cache train cache --eval-pairs de", ["demo/train"]),
        ("dpo-cache export cache ", ["demo/train"]),
        ("dpo-cache train other --pairs ", []),
        ("dpo-cache train --cache ", []),  # then the shell completes names of files
    ],
)
def test_values_are_completed(tmp_path: Path, line: str, expected: list[str]) -> None:
    make_cache(tmp_path / "cache")
    assert completed(tmp_path, line) == expected


@pytest.mark.parametrize("value", ["1", "anything"])
def test_no_color_has_no_colors(tmp_path: Path, value: str) -> None:
    """On a terminal: `--help` and the progress line."""
    script = (
        "import os, sys; sys.stderr = open(os.ttyname(0), 'w');"
        "from dpo_cache.terminal import Shown, TerminalLine;"
        "line = TerminalLine('scoring'); line.update(Shown('50%', 0.5)); line.close();"
        "sys.argv = ['dpo-cache', 'ls', '--help'];"
        "from dpo_cache.cli.app import main; main()"
    )
    written = {}
    for name in ("colors", "NO_COLOR"):
        environment = {key: entry for key, entry in os.environ.items() if key != "NO_COLOR"}
        environment |= {"TERM": "xterm-256color"} | ({"NO_COLOR": value} if name == "NO_COLOR" else {})
        reader, terminal = os.openpty()
        done = subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdin=terminal, stdout=terminal, stderr=terminal
        )
        os.close(terminal)
        written[name] = read_all(reader)
        assert done.wait() == 0, written[name]
    assert "38;5" in written["colors"]
    for color in ("\x1b[3", "\x1b[9", "\x1b[4", "\x1b[1;3", "38;5"):
        assert color not in written["NO_COLOR"], color
    assert "scoring" in written["NO_COLOR"] and "Usage: " in written["NO_COLOR"]


def read_all(reader: int) -> str:
    parts = []
    try:
        while part := os.read(reader, 65536):
            parts.append(part)
    except OSError:  # the terminal is closed
        pass
    os.close(reader)
    return b"".join(parts).decode()


def test_the_version_has_the_libraries_and_imports_none() -> None:
    script = (
        "import sys; sys.argv = ['dpo-cache', '--version']\n"
        "from dpo_cache.cli.app import main\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0][0] == "dpo-cache" and [line[0] for line in lines[1:5]] == [
        "python",
        "torch",
        "transformers",
        "peft",
    ]
