"""Files are read and written alike on every system: no default encoding, no name that Windows forbids."""

import ast
import nturl2path
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.errors import ModelError, OptionError
from dpo_cache.lm.model.checkpoint_files import _named_file
from dpo_cache.store.cache import check_name
from dpo_cache.store.folders import folder as folder_module
from dpo_cache.store.folders.folder import open_folder, path_of_url
from dpo_cache.store.folders.local import LocalFolder
from dpo_cache.store.starting_model import default_start
from dpo_cache.sweeping.grid import run_names

PACKAGE = Path(dpo_cache.__file__).parent
OF_LINUX = {"files/machine.py", "lm/device.py", "lm/free_memory.py"}  # read /proc and /sys


def text_calls(path: Path) -> list[str]:
    """Places that read or write text in the encoding of the system; JSON is written in ASCII."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(one.arg == "encoding" for one in node.keywords):
            continue
        call = ast.unparse(node)
        if isinstance(node.func, ast.Attribute):
            is_json = "json.dumps(" in call or call.endswith(r"'{}\n')")
            is_text = node.func.attr == "read_text" or (node.func.attr == "write_text" and not is_json)
        else:
            mode = (
                node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else "r"
            )
            is_text = call.startswith("open(") and "b" not in str(mode)
        if is_text:
            found.append(f"{path.relative_to(PACKAGE).as_posix()}:{node.lineno}")
    return found


def test_no_text_is_read_or_written_in_the_encoding_of_the_system() -> None:
    found = [place for path in sorted(PACKAGE.rglob("*.py")) for place in text_calls(path)]
    assert [place for place in found if place.partition(":")[0] not in OF_LINUX] == []


@pytest.mark.parametrize(
    "location", [r"C:\cache", "C:/cache", "C://cache", r"cache\preferences", r"\\server\cache"]
)
def test_a_cache_on_a_drive_is_a_folder(location: str) -> None:
    found = open_folder(location)
    assert isinstance(found, LocalFolder) and found.root == Path(location)


def test_a_file_url_names_a_drive_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "url2pathname", nturl2path.url2pathname)
    assert str(path_of_url("file:///C:/my%20cache")) == r"C:\my cache"


@pytest.mark.parametrize("name", ["con", "NUL", "aux.v2", "com1", "LPT9.train", "pairs."])
def test_names_that_windows_forbids_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="Windows has no folder of this name"):
        check_name(name)


@pytest.mark.parametrize("name", ["console", "com10", "v1.con", "pairs.v2", "null"])
def test_names_that_look_alike_are_allowed(name: str) -> None:
    assert check_name(name) == name


def test_names_of_runs_are_allowed_everywhere() -> None:
    values = ["a<b>c", 'q"x"', "a|b", "a?b*", "C:\\x", "ends.", "a/b"]
    names = run_names([{"model": value} for value in values])
    assert len(set(names)) == len(values)
    for name in names:
        assert not set(name) & set('<>:"/\\|?*') and not name.endswith((".", " "))


@pytest.mark.parametrize(
    "name", ["C:evil.safetensors", r"..\evil.safetensors", r"C:\evil.safetensors", "/evil.safetensors"]
)
def test_a_config_names_no_file_of_another_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ModelError, match="expected a safetensors file, or an index of some, in the same folder"
    ):
        _named_file(tmp_path, name)


@pytest.mark.parametrize("place", [r"C:\models\llama", "/home/me/none", r"\\server\models\llama"])
def test_a_model_that_another_system_recorded_is_gone(place: str) -> None:
    reference = {"identity": {"weights": "0" * 64}, "provenance": {"model": place, "revision": None}}
    with pytest.raises(ModelError, match="is gone"):
        default_start(reference)
