import hashlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piecework.foundation.digests import canonical_json, digest_bytes, digest_file, digest_json, is_digest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def test_bytes_and_file_agree(tmp_path: Path) -> None:
    data = b"\x00\xff" * 100_000
    (tmp_path / "file").write_bytes(data)
    assert digest_bytes(data) == digest_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@given(JSON)
def test_canonical_json_reads_back(value: object) -> None:
    assert json.loads(canonical_json(value)) == value


def test_canonical_json_ignores_order_and_nothing_else() -> None:
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": [1, 2], "a": 1})
    values = [{"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": None}, {"a": [1]}, {"A": 1}, {}]
    assert len({digest_json(value) for value in values}) == len(values)


def test_canonical_json_takes_what_config_files_hold() -> None:
    assert canonical_json({"limit": math.inf, "name": "é"}) == b'{"limit":Infinity,"name":"\\u00e9"}'
    with pytest.raises(TypeError):
        canonical_json({"path": Path()})


def test_is_digest() -> None:
    assert is_digest(digest_bytes(b""))
    for text in ("", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n"):
        assert not is_digest(text)
