"""Small Parquet and Arrow files, and damage behind headers and footers that are whole."""

import functools
import io
import json
import random

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
from fuzz_bytes import damaged, damaged_between, extreme, splice
from fuzz_pictures import cells

ROWS = 8
HUGGINGFACE = {
    "huggingface": json.dumps({"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}})
}


def _table() -> pa.Table:
    rows = [{"bytes": data, "path": f"images/{n}.png"} for n, data in enumerate(cells())]
    columns = {
        "image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "caption": pa.array(
            [[f"one {n}", "zwei drei"][: 1 + n % 2] for n in range(ROWS)], pa.list_(pa.string())
        ),
        "label": pa.array([n % 2 for n in range(ROWS)], pa.int64()),
        "text": pa.array([f"some prose of row {n} " * 20 for n in range(ROWS)], pa.string()),
        "split": pa.array(["train"] * ROWS).dictionary_encode(),
        "weight": pa.array([0.5] * ROWS, pa.float32()),
    }
    return pa.table(columns).replace_schema_metadata(HUGGINGFACE)


def _plain_table() -> pa.Table:
    """Paths or bytes in place of structs, and texts in place of lists."""
    return pa.table(
        {
            "image": pa.array([f"images/{n % 6}.png" for n in range(ROWS)], pa.large_string()),
            "caption": pa.array([f"caption {n}" for n in range(ROWS)], pa.string_view()),
            "label": pa.array([f"class {n % 2}" for n in range(ROWS)]).dictionary_encode(),
            "text": pa.array([f"prose {n}" if n % 3 else None for n in range(ROWS)]),
            "id": pa.array(range(ROWS), pa.uint16()),
        }
    )


def _bytes_table() -> pa.Table:
    return pa.table(
        {
            "image": pa.array(cells(), pa.large_binary()),
            "caption": pa.array(
                [[f"c {n}"] * (n % 3) for n in range(ROWS)], pa.large_list(pa.large_string())
            ),
            "label": pa.array([float(n) for n in range(ROWS)]),
            "text": pa.array(["some words " * 500] * ROWS).dictionary_encode(),
        }
    )


@functools.cache
def _parquets() -> tuple[bytes, ...]:
    found = []
    for make in (_table, _plain_table, _bytes_table):
        for options in (
            {"compression": "none", "use_dictionary": False},
            {"compression": "snappy"},
            {"compression": "zstd", "data_page_version": "2.0", "row_group_size": 3},
            {"compression": "gzip", "data_page_size": 5000, "write_page_index": True},
            {"compression": "lz4", "write_page_checksum": True, "store_schema": False},
            {"compression": "none", "data_page_version": "2.0", "column_encoding": "DELTA_BYTE_ARRAY"},
            {"compression": "brotli", "column_encoding": "DELTA_LENGTH_BYTE_ARRAY"},
        ):
            stream, table = io.BytesIO(), make()
            if "column_encoding" in options:
                texts = ("image", "caption", "text") if make is _plain_table else ("text",)
                table = table.set_column(
                    table.schema.get_field_index("text"), "text", table["text"].cast(pa.string())
                )
                if make is _plain_table:
                    table = table.set_column(1, "caption", table["caption"].cast(pa.string()))
                options |= {
                    "column_encoding": dict.fromkeys(texts, options["column_encoding"]),
                    "use_dictionary": False,
                }
            pq.write_table(table, stream, **options)
            found.append(stream.getvalue())
    return tuple(found)


@functools.cache
def _bomb(column: str, rows: int) -> bytes:
    """A small file of which a group is gigabytes: a dictionary with one long cell for all rows."""
    cell = cells()[0].ljust(2 * 2**20, b"\0") if column == "image" else b"some words " * 2**17
    same = pa.array([0] * rows, pa.int32())
    columns = {
        "image": pa.DictionaryArray.from_arrays(same, pa.array([cell if column == "image" else cells()[1]])),
        "caption": pa.array([f"c {n}" for n in range(rows)]),
        "text": pa.DictionaryArray.from_arrays(
            same, pa.array([cell.decode() if column == "text" else "words"])
        ),
    }
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, store_schema=False)
    return stream.getvalue()


def parquet(draw: random.Random) -> tuple[str, bytes]:
    if draw.random() < 0.004:
        return ".parquet", _bomb(draw.choice(("image", "text")), draw.choice((100, 2000)))
    data = draw.choice(_parquets())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    way = draw.random()
    if way < 0.3:  # pages, anywhere
        data = damaged_between(draw, data, 4, footer)
    elif way < 0.55:  # the first bytes of a page: its header, levels and offsets
        group = draw.choice(_chunks(data))
        start = draw.choice(group)
        data = damaged_between(draw, data, start, min(footer, start + draw.choice((12, 30, 80))))
    elif way < 0.75:
        data = damaged_between(draw, data, footer, len(data) - 8)
    elif way < 0.82:  # a footer of another length
        changed = damaged(draw, data[footer:-8], 1)
        data = data[:footer] + changed + len(changed).to_bytes(4, "little") + b"PAR1"
    elif way < 0.88:
        size = (
            extreme(draw, 4, "little")
            if draw.random() < 0.5
            else draw.randrange(len(data)).to_bytes(4, "little")
        )
        data = data[:-8] + size + data[-4:]
    elif way < 0.94:
        data = splice(draw, data, draw.choice(_parquets()))
    else:
        data = damaged(draw, data)
    return ".parquet", data


@functools.cache
def _chunks(data: bytes) -> list[list[int]]:
    """Where the pages of each column begin."""
    metadata = pq.read_metadata(io.BytesIO(data))
    found = []
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(place)
            starts = [
                chunk.data_page_offset,
                chunk.dictionary_page_offset if chunk.has_dictionary_page else None,
            ]
            found.append([start for start in starts if start])
    return found


@functools.cache
def _arrows() -> tuple[bytes, ...]:
    found = []
    for table in (_table(), _plain_table(), _bytes_table()):
        for packed in (None, "lz4", "zstd"):
            options = pa.ipc.IpcWriteOptions(compression=packed)
            for new in (pa.ipc.new_file, pa.ipc.new_stream):
                stream = io.BytesIO()
                # a dictionary that changes is no part of a file
                with new(stream, table.schema, options=options) as writer:
                    writer.write_table(table.unify_dictionaries(), 3)
                found.append(stream.getvalue())
    feather = io.BytesIO()
    pyarrow.feather.write_feather(_table(), feather, version=2)
    return (*found, feather.getvalue())


def arrow(draw: random.Random) -> tuple[str, bytes]:
    data = draw.choice(_arrows())
    way = draw.random()
    if way < 0.2:
        data = damaged_between(draw, data, 8, min(3000, len(data)))
    elif way < 0.45:  # a number where one is: offsets, sizes, lengths
        for _ in range(draw.randint(1, 3)):
            start = draw.randrange(8, len(data) - 8) // 4 * 4
            size = draw.choice((4, 4, 8))
            near = draw.choice((data[start], -1, 2**20)).to_bytes(size, "little", signed=True)
            data = data[:start] + draw.choice((extreme(draw, size, "little"), near)) + data[start + size :]
    elif way < 0.7:
        data = damaged_between(draw, data, 8, len(data) - 8)
    elif way < 0.8:
        data = damaged_between(draw, data, max(0, len(data) - 2500), len(data) - 10)
    elif way < 0.87:
        data = splice(draw, data, draw.choice(_arrows()))
    else:
        data = damaged(draw, data)
    return draw.choice((".arrow", ".feather")), data
