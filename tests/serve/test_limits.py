from __future__ import annotations

from pathlib import Path

import pytest

from leadline.serve.limits import KeyFileError, Keys, Refused

ONE, TWO = "sk-1111111111111111", "sk-2222222222222222"


def test_each_key_has_a_namespace_of_its_own() -> None:
    keys = Keys([ONE, TWO])
    spaces = [keys.namespace({"authorization": f"Bearer {key}"}) for key in (ONE, TWO)]
    assert len({*spaces, ""}) == 3
    assert keys.namespace({"x-api-key": ONE}) == spaces[0]
    assert ONE not in spaces[0]


def test_without_keys_everybody_may_ask() -> None:
    assert Keys([]).namespace({}) == ""


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ONE},
        {"authorization": f"Basic {ONE}"},
        {"authorization": f"Bearer {ONE}x"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer", "x-api-key": ""},
        {"x-api-key": ONE[:-1]},
        {"x-api-key": "\udcff"},
    ],
)
def test_a_wrong_key_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(Refused, match="no valid API key") as refused:
        Keys([ONE, TWO]).namespace(headers)
    assert refused.value.status == 401
    assert ONE not in str(refused.value)


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{ONE}\n\n  {TWO}  \n")
    assert Keys.from_file(file).namespace({"x-api-key": TWO}) == Keys([TWO]).namespace({"x-api-key": TWO})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no key"),
        (b"# none\n", "holds no key"),
        (b"short", "key 1 is weak"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_bad_file_of_keys_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(KeyFileError, match=words):
        Keys.from_file(file)


def test_a_missing_file_of_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be read"):
        Keys.from_file(tmp_path / "none")
