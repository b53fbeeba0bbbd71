"""Lines of a run's files, whole and damaged."""

import json
from pathlib import Path

import pytest

from fastgrpo.reporting.run_folder import RunFolder, read_lines, readable_lines
from fastgrpo.reporting.runlog import RunLog

ROWS = [{"iteration": 1, "reward": 0.5}, {"iteration": 2, "seconds": {"rollout": 1.0}}, {"iteration": 2}]
WHOLE = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
BROKEN = [b'{"iter', b"3", b"[]", b"{}", b'{"iteration": "3"}', b'{"iteration": 1e999}', b'{"iteration": 3, "a": "\xff"}']


def test_whole_files_are_read_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(WHOLE)
    assert read_lines(tmp_path / "a.jsonl") == ROWS and readable_lines(tmp_path / "a.jsonl") == (ROWS, [])
    assert read_lines(tmp_path / "none.jsonl") == [] and readable_lines(tmp_path / "none.jsonl") == ([], [])


def test_a_file_that_an_editor_saved_is_read_too(tmp_path: Path) -> None:
    """With a byte order mark, \\r\\n, and what Unicode calls a line's end inside a text."""
    rows = [{"iteration": 1, "tag": "a\u2028b\x85c"}, {"iteration": 2}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).replace("{", "{\r")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_lines(tmp_path / "a.jsonl") == rows and readable_lines(tmp_path / "a.jsonl") == (rows, [])


def test_nesting_without_end_is_damage(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"[" * 100_000 + b"\n" + WHOLE)
    assert readable_lines(tmp_path / "a.jsonl") == (ROWS, [1])


@pytest.mark.parametrize("length", range(1, len(json.dumps(ROWS[1]))))
def test_a_last_line_cut_anywhere_is_no_row(length: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(WHOLE + json.dumps(ROWS[1]).encode()[:length])
    assert read_lines(tmp_path / "a.jsonl") == ROWS
    assert readable_lines(tmp_path / "a.jsonl") == (ROWS, [4])


@pytest.mark.parametrize("broken", BROKEN)
def test_damage_before_the_last_line_is_refused_or_left_out(broken: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(WHOLE + broken + b"\n" + WHOLE)
    with pytest.raises(ValueError, match="a.jsonl:4: not JSON with an iteration; remove the line"):
        read_lines(tmp_path / "a.jsonl")
    assert readable_lines(tmp_path / "a.jsonl") == (ROWS + ROWS, [4])


def test_what_a_log_writes_lies_where_the_folder_says(tmp_path: Path) -> None:
    folder, log = RunFolder(tmp_path), RunLog(tmp_path, 0)
    log.metrics(ROWS[0])
    log.evaluation({"iteration": 0, "accuracy": {"overall": 0.5}})
    log.summary({"seed": 1})
    log.close()
    assert read_lines(folder.metrics) == ROWS[:1] and read_lines(folder.evaluations)[0]["iteration"] == 0
    assert json.loads(folder.summary.read_text()) == {"seed": 1}
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl", "evaluations.jsonl", "summary.json", "samples", "tensorboard",
    }  # fmt: skip
