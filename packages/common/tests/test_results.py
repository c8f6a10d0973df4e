import json
from pathlib import Path

import pytest

from fourfold_common import Results


def _example() -> Results:
    results = Results("mole", command="mole bench decode", seed=3)
    results.add("dense", "decode", 2.0, "ms", p20=1.9, p80=2.2, n=5, batch=1)
    results.add("dense", "memory", 1234567, "bytes", batch=1)
    results.add("lookup", "decode", 2.125, "ms", error=1e-6, batch=32)
    results.add("lookup", "exact", "yes", "", batch=32)
    return results


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    saved = _example()
    path = saved.save(tmp_path / "new" / "folder" / "results.json")
    loaded = Results.load(path)
    assert vars(loaded) == vars(saved)
    assert json.loads(path.read_text())["schema"] == 1


def test_the_table_pivots_metrics_into_columns() -> None:
    assert _example().to_markdown().splitlines() == [
        "| batch | mole   | decode (ms) | memory (bytes) | exact |",
        "| ----- | ------ | ----------: | -------------: | ----: |",
        "| 1     | dense  |           2 |      1,234,567 |       |",
        "| 32    | lookup |       2.125 |                |   yes |",
    ]


def test_an_empty_table_is_a_header() -> None:
    assert Results("mole").to_markdown().splitlines()[0] == "| mole |"


def test_a_failed_save_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = _example().save(tmp_path / "results.json")
    before = path.read_text()
    broken = _example()
    broken.cases.append({"median": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken.save(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"results file of schema 1.*other\.json"):
        Results.load(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Results.load(tmp_path / "none.json")
