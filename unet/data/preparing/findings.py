"""What a preparation left out, repaired or warns of: the first of each kind in the manifest, all of it beside it.

A manifest is read by every process that reads the data, so it holds no list that grows with them.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from unet.data.manifest import REPORT
from unet.data.shards import Prepared
from unet.data.sources import Problem, Source
from unet.storage import Folder

FINDINGS = "findings.parquet"
LISTED = 1000
"""Samples of each problem or repair that the manifest itself lists."""


class Findings(NamedTuple):
    """Each a table of `name, split, kind` (the problem or repair) and `detail`, in the order they were found."""

    left_out: pa.Table
    repaired: pa.Table
    warnings: pa.Table

    @classmethod
    def of(cls, kept: pa.Table, source: Source, left_out: list[Problem], warnings: list[Problem]) -> "Findings":
        """Of the samples that stay (`unet.data.preparing.pieces.facts_schema`), and the problems."""
        return cls(_problems(left_out), _repairs(kept, source), _problems(warnings))

    def entries(self) -> dict:
        """The entries of a manifest: of each list the first `LISTED` of every kind, and in `totals` their number."""
        rows = {name: _first(table).to_pylist() for name, table in self._asdict().items()}
        keys = ("name", "split", "problem", "detail")
        found = {
            name: [dict(zip(keys, row.values(), strict=True)) for row in rows[name]]
            for name in ("left_out", "warnings")
        }
        found["repaired"] = [{"name": row["name"], "repair": row["kind"]} for row in rows["repaired"]]
        totals = {}
        for name, table in self._asdict().items():
            counts = pc.value_counts(table["kind"])
            totals[name] = dict(zip(*(counts.field(i).to_pylist() for i in (0, 1)), strict=True))
        return found | {"totals": totals}

    def write(self, folder: Folder) -> bool:
        """Write all of it into `findings.parquet`, with a column `list`; not where the manifest lists all of it."""
        if all(len(_first(table)) == len(table) for table in self):
            return False
        parts = [t.add_column(0, "list", pa.array([name] * len(t), pa.string())) for name, t in self._asdict().items()]
        with folder.writing(FINDINGS) as stream:
            pq.write_table(pa.concat_tables(parts), stream, compression="zstd", write_page_checksum=True)
        return True


_SCHEMA = pa.schema([(name, pa.string()) for name in ("name", "split", "kind", "detail")])


def _problems(problems: Iterable[Problem]) -> pa.Table:
    rows = [{"name": p.name, "split": p.split, "kind": p.problem, "detail": p.detail} for p in problems]
    return pa.Table.from_pylist(rows, _SCHEMA)


def _repairs(kept: pa.Table, source: Source) -> pa.Table:
    """Those of each sample, then those of the source itself."""
    repairs, names = kept["repairs"].combine_chunks(), kept["name"]
    own = pc.list_parent_indices(repairs)
    of_source = [i for i, name in enumerate(names.to_pylist()) if name in source.repairs] if source.repairs else []
    repaired = kept.select(["name", "split"]).take(pa.concat_arrays([own, pa.array(of_source, own.type)]))
    kinds = [*pc.list_flatten(repairs).to_pylist(), *(source.repairs[names[i].as_py()] for i in of_source)]
    columns = [*repaired.columns, pa.array(kinds, pa.string()), pa.array([""] * len(kinds), pa.string())]
    return pa.table(columns, schema=_SCHEMA)


def _first(table: pa.Table) -> pa.Table:
    """The rows of which there are fewer than `LISTED` of the same kind before them."""
    kinds = table["kind"].combine_chunks().dictionary_encode().indices.to_numpy()
    rows = [np.flatnonzero(kinds == kind)[:LISTED] for kind in np.unique(kinds)]
    return table.take(pa.array(np.sort(np.concatenate(rows))) if rows else pa.array([], pa.int64()))


def checks_row(prepared: Prepared) -> list[tuple[str, str]]:
    """The row of an overview with the numbers of what the checks of the data found; none if they found nothing."""
    manifest = prepared.manifest
    lists = ("left out", "left_out"), ("repaired", "repaired"), ("look wrong", "warnings")
    counts = [(what, manifest.kinds(found).total()) for what, found in lists]
    found = ", ".join(f"{count:,} {what}" for what, count in counts if count)
    return [("checks", f"{found}: {prepared.folder}/{REPORT}")] if found else []
