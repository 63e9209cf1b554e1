from pathlib import Path

import pytest

from benchmarks.cells.load import mapped_file_bytes, status_bytes

STATUS = "Name:\tpython\nVmHWM:\t   2048 kB\nVmRSS:\t   1024 kB\n"
MAPPINGS = """\
7f00-7f01 r--s 00000000 fd:00 1                          {file}
Size:                 64 kB
Rss:                  12 kB
VmFlags: rd sh
7f01-7f02 r--s 00000000 fd:00 2                          {file}.other
Rss:                 500 kB
7f02-7f03 rw-p 00000000 00:00 0
Rss:                 700 kB
7f03-7f04 r--p 00000000 fd:00 1                          {file}
Rss:                   4 kB
"""


def test_of_a_status_file(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(STATUS)
    assert status_bytes("VmRSS:", status) == 1 << 20
    assert status_bytes("VmHWM:", status) == 2 << 20


def test_a_status_file_that_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\n")
    with pytest.raises(LookupError):
        status_bytes("VmRSS:", tmp_path / "status")


def test_only_the_mappings_of_the_file_count(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    (tmp_path / "smaps").write_text(MAPPINGS.format(file=file))
    assert mapped_file_bytes(file, mappings=tmp_path / "smaps") == 16 << 10


def test_of_this_process() -> None:
    assert 1 << 20 < status_bytes("VmRSS:") <= status_bytes("VmHWM:")
    assert mapped_file_bytes(Path("/no/such/file")) == 0
