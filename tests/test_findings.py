"""What was left out, repaired or warned of: all counted, the first of each kind in the manifest, all beside it."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unet.classes import PETS
from unet.data.preparing import findings
from unet.data.preparing.findings import FINDINGS, Findings
from unet.data.sources import Problem, Source
from unet.storage import Folder


@pytest.fixture
def found() -> Findings:
    """Six samples, two of them with two repairs, and one that the source has repaired; five problems of two kinds."""
    repairs = [["turned", "grey to RGB"], [], ["turned"], ["grey to RGB", "turned"], ["turned"], []]
    kept = pa.table(
        {"name": list("abcdef"), "split": ["train"] * 6, "repairs": pa.array(repairs, pa.list_(pa.string()))}
    )
    left_out = [Problem(f"bad {i}", "damaged" if i % 2 else "empty_file", f"detail {i}", "test") for i in range(5)]
    return Findings.of(kept, Source("own", [], PETS, repairs={"f": "re-encoded"}), left_out, [])


def test_short_lists_stand_whole_in_the_manifest(found, tmp_path):
    entries = found.entries()
    assert [tuple(row.values()) for row in entries["repaired"]] == [
        ("a", "turned"),
        ("a", "grey to RGB"),
        ("c", "turned"),
        ("d", "grey to RGB"),
        ("d", "turned"),
        ("e", "turned"),
        ("f", "re-encoded"),
    ]
    assert entries["left_out"][1] == {"name": "bad 1", "split": "test", "problem": "damaged", "detail": "detail 1"}
    assert len(entries["left_out"]) == 5 and entries["warnings"] == []
    assert entries["totals"] == {
        "left_out": {"empty_file": 3, "damaged": 2},
        "repaired": {"turned": 4, "grey to RGB": 2, "re-encoded": 1},
        "warnings": {},
    }
    assert not found.write(Folder(tmp_path)) and not list(tmp_path.iterdir())


def test_long_lists_are_cut_by_kind_and_whole_beside_it(found, tmp_path, monkeypatch):
    whole = found.entries()
    monkeypatch.setattr(findings, "LISTED", 2)
    entries = found.entries()
    assert [row["name"] for row in entries["repaired"]] == ["a", "a", "c", "d", "f"]  # the rare ones too
    assert [row["name"] for row in entries["left_out"]] == ["bad 0", "bad 1", "bad 2", "bad 3"]
    assert entries["totals"] == whole["totals"] and json.dumps(entries)
    assert found.write(Folder(tmp_path))
    rows = pq.read_table(tmp_path / FINDINGS).to_pylist()
    assert [(row["name"], row["kind"]) for row in rows if row["list"] == "repaired"] == [
        tuple(row.values()) for row in whole["repaired"]
    ]
    assert len(rows) == 12 and {row["list"] for row in rows} == {"left_out", "repaired"}
