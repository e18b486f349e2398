"""Arrow and Parquet of plain columns only."""

import pyarrow as pa
import pyarrow.parquet as pq


def open_parquet(stream: pa.NativeFile, **options) -> pq.ParquetFile:
    """A Parquet file of plain columns.

    Raises:
        ArrowInvalid: it holds others.
    """
    file = pq.ParquetFile(stream, **options)
    check_plain(file.schema_arrow)
    return file


def check_plain(schema: pa.Schema) -> None:
    """Refuse columns of extension types: the values of those that Ray registers are pickles, which run code when read.

    Raises:
        ArrowInvalid: there is one.
    """

    def is_plain(kind: pa.DataType) -> bool:
        if isinstance(kind, pa.BaseExtensionType):
            return False
        inner = [kind.value_type] if pa.types.is_dictionary(kind) else []
        return all(map(is_plain, inner + [kind.field(i).type for i in range(kind.num_fields)]))

    for column in schema:
        if not is_plain(column.type):
            raise pa.ArrowInvalid(f"its column {column.name} is not of a plain type")
