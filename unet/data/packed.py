"""A table as one row of another: a unit of work that Ray Data neither cuts nor joins.

Its processes on GPUs must be given a number of rows as a batch; with units as rows that is one, on CPUs as well.
"""

import pyarrow as pa

UNIT = "unit"


def packed(table: pa.Table) -> pa.Table:
    """The table as one row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content = sink.getvalue()
    ends = pa.array([0, content.size], pa.int64()).buffers()[1]
    return pa.table({UNIT: pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, content])})


def unpacked(row: pa.Table) -> pa.Table:
    """The table that a row is, over the same memory."""
    with pa.ipc.open_stream(row[UNIT][0].as_buffer()) as stream:
        return stream.read_all()
