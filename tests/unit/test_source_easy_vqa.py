"""easy-VQA as Parquet files."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import examples, ids, png

from beitctl.errors import DataError
from beitctl_plugins.sources.easy_vqa import EasyVQA

ROWS = [("what is it?", "circle", 0), ("is it red?", "yes", 1), ("is it blue?", "no", 0)]
COLOURS = [(255, 0, 0), (0, 255, 0)]


def write(root, rows=ROWS, pictures=None, split="train"):
    columns = ("question", "answer", "image_id")
    asked = {name: [row[place] for row in rows] for place, name in enumerate(columns)}
    pq.write_table(pa.table(asked), root / f"easyvqa_{split}_questions.parquet")
    kept = pictures or [(n, png(colour)) for n, colour in enumerate(COLOURS)]
    table = pa.table({"image_id": [n for n, _ in kept], "image": [data for _, data in kept]})
    pq.write_table(table, root / f"easyvqa_{split}_images.parquet")
    return root


def source(path, **table):
    return EasyVQA(path=path, **({"max_bad_share": 1.0} | table))


def test_questions_come_with_their_picture_and_one_answer(tmp_path):
    opened = source(write(tmp_path)).open()
    assert [(e.id, e.text, e.answers) for e in examples(opened)] == [
        ("q0", "what is it?", ("circle",)), ("q1", "is it red?", ("yes",)), ("q2", "is it blue?", ("no",)),
    ]  # fmt: skip
    assert [e.image for e in examples(opened)] == [png(COLOURS[0]), png(COLOURS[1]), png(COLOURS[0])]
    assert (opened.problems, opened.lengths) == ([], [11, 10, 11])


def test_what_belongs_to_nothing_is_listed(tmp_path):
    rows = [*ROWS[:1], ("", "yes", 0), ("is it?", "no", 7), ("why?", None, 0)]
    pictures = [(0, png()), (0, png()), (2, b""), (3, png())]
    opened = source(write(tmp_path, rows, pictures)).open()
    assert ids(opened) == ["q0"]
    assert opened.problems == [
        "easyvqa_train_images.parquet: row 1: another one has its image_id, 0",
        "easyvqa_train_images.parquet: row 2: no number or no bytes of a picture",
        "easyvqa_train_questions.parquet: q1: question is no text or blank",
        "easyvqa_train_questions.parquet: q2: no picture 7",
        "easyvqa_train_questions.parquet: q3: answer is no text or blank",
        "easyvqa_train_images.parquet: picture 3: no question about it",
    ]
    with pytest.raises(DataError, match="6 of 7 rows are unusable"):
        source(tmp_path, max_bad_share=0.5).open()


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"not the folder of easy-VQA: no easyvqa_train_questions\.parquet"):
        source(tmp_path).open()
    write(tmp_path)
    pq.write_table(pa.table({"id": [0]}), tmp_path / "easyvqa_train_images.parquet")
    with pytest.raises(DataError, match="no column image_id, image, only id"):
        source(tmp_path).open()
    (tmp_path / "easyvqa_train_images.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"easyvqa_train_images\.parquet: cannot be read"):
        source(tmp_path).open()


def test_the_content_decides_the_fingerprint(tmp_path):
    before = source(write(tmp_path)).open().fingerprint
    assert source(write(tmp_path)).open().fingerprint == before
    assert source(write(tmp_path, ROWS[:2])).open().fingerprint != before


def test_guess_knows_the_files(tmp_path):
    assert EasyVQA.guess(tmp_path) is None
    write(tmp_path, split="test")
    assert EasyVQA.guess(tmp_path) == (9, {"path": str(tmp_path), "split": "test"})
