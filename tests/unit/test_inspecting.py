"""What is found at a path, and what is counted."""

import io
import threading

import numpy as np
import pytest
from inspected import BROKEN, Opened, examples, found, install, picture
from PIL import Image

from beitctl.api import Example
from beitctl.data.images import Pictures
from beitctl.errors import ChangedError, DataError, PluginError, UserError
from beitctl.inspecting.checking import check, refuse
from beitctl.inspecting.counting import Classes, Digests, Spread, Writing, script
from beitctl.inspecting.finding import contents, find
from beitctl.inspecting.looking import look
from beitctl.inspecting.ordered import in_order
from beitctl.inspecting.sheet import chosen, sheet
from beitctl.inspecting.showing import show, size
from beitctl.report.naming import printable


@pytest.fixture
def place(monkeypatch, tmp_path):
    install(monkeypatch, made="Made", sure="Sure", named="Named")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.made").touch()
    return tmp_path


def checked(rows, **options):
    source, opened = found(rows, **options)
    return check(source, opened)


def test_the_surest_source_reads_a_path(place):
    assert find("x.made").kind == "sure"


def test_of_equally_sure_sources_the_first_in_the_alphabet_reads_and_the_others_are_named(place, monkeypatch):
    install(monkeypatch, made="Made", also="Also")
    source = find("x.made")
    assert (source.kind, source.also) == ("also", ("made",))


def test_a_source_that_cannot_be_asked_is_a_warning(place, monkeypatch):
    install(monkeypatch, made="Made", faulty="Faulty", gone="no_such_module:X")
    source = find("x.made")
    assert source.kind == "made"
    assert ["RuntimeError: oh" in source.warnings[0], "cannot be imported" in source.warnings[1]] == [
        True
    ] * 2


def test_a_kind_that_is_named_reads_whatever_others_think(place):
    source = find("x.made", "made", ["size=3"])
    assert source.line == 'source = { kind = "made", path = "x.made", size = 3 }'
    assert source.source.size == 3


def test_a_source_without_a_path_takes_it_as_its_one_required_setting(place):
    assert find("owner/name", "named").table == {"name": "owner/name"}


def test_the_recipe_line_is_toml_whatever_the_path(place):
    import tomllib

    name = 'a "b"\n\\ü'
    line = find(name, "made").line
    assert tomllib.loads(line) == {"source": {"kind": "made", "path": name}}


def test_no_source_that_fits_names_the_layouts_and_what_is_there(place, monkeypatch):
    install(monkeypatch, made="Made")
    (place / "d").mkdir()
    for name in ("1.xyz", "2.XYZ", "README"):
        (place / "d" / name).touch()
    with pytest.raises(UserError) as caught:
        find("d")
    text = str(caught.value)
    assert "Found: 2 .xyz, 1 without an ending in 1 folder." in text
    assert "  made  Made-up examples." in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("none",), "none: no such file or folder"),
        (("n" * 300,), "cannot be read (File name too long)"),
        (("x.made", "mad"), "did you mean 'made'?"),
        (("x.made", "made", ["size=many"]), "size: must be a whole number"),
        (("x.made", "made", ["sise=1"]), "unknown key, did you mean 'size'?"),
        (("x.made", "made", ["size"]), "--set size: expected KEY=VALUE"),
        (("x.made", None, ['kind="made"']), "the source is named with --kind"),
    ],
)
def test_wrong_words_are_refused_with_what_is_allowed(place, arguments, says):
    with pytest.raises((UserError, PluginError)) as caught:
        find(*arguments)
    assert says in str(caught.value)


def test_contents_counts_files_by_ending(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.TXT").touch()
    assert contents(tmp_path) == "1 .txt in 2 folders"
    assert contents(tmp_path / "a" / "1.TXT") == "a file that ends in .TXT"


def test_results_come_in_order_from_several_threads():
    seen = set()

    def square(index):
        seen.add(threading.current_thread().name)
        return index * index

    assert list(in_order(square, range(1000), 3)) == [n * n for n in range(1000)]
    assert threading.current_thread().name not in seen


def test_threads_stop_when_the_reader_leaves():
    done = []
    stream = in_order(done.append, range(100_000), 2)
    next(stream)
    stream.close()
    assert len(done) < 1000
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("beitctl-data")]


def test_an_error_in_a_thread_reaches_the_reader():
    def fail(index):
        raise UserError("no")

    with pytest.raises(UserError):
        list(in_order(fail, range(3), 2))


def test_a_spread_has_the_nearest_rank_of_small_numbers_and_three_digits_of_large_ones():
    spread = Spread()
    for value in [*range(1, 101), 123_456]:
        spread.add(value)
    assert spread.summary() == {"min": 1, "median": 51, "p99": 100, "max": 123_456}
    assert spread.below(51) == 50 / 101
    assert Spread().summary() == {}


def test_a_spread_keeps_few_numbers_of_many():
    spread = Spread()
    for value in range(10_000, 1_000_000, 7):
        spread.add(value)
    assert len(spread._counts) < 2000


def test_equal_hashes_are_found_in_the_order_they_came():
    digests = Digests()
    for place, letter in enumerate(b"abcabda"):
        digests.add(bytes([letter]) * 16, place)
    assert digests.equal() == (2, 3, [[0, 3, 6], [1, 4]])
    assert digests.equal(groups=1, members=2) == (2, 3, [[0, 3]])


def test_no_equal_hashes():
    digests = Digests()
    for place in range(5):
        digests.add(bytes([place]) * 16, place)
    assert digests.equal() == (0, 0, [])


@pytest.mark.parametrize(
    ("letter", "name"),
    [("a", "Latin"), ("é", "Latin"), ("я", "Cyrillic"), ("中", "Han"), ("〇", ""), ("あ", "Hiragana"),
     ("ｱ", "Katakana"), ("한", "Hangul"), ("ع", "Arabic"), ("क", "Devanagari"), ("α", "Greek"),
     ("1", ""), (" ", ""), ("😀", ""),
     ("𝐀", "other"), ("\ud800", "")],
)  # fmt: skip
def test_the_script_of_a_letter(letter, name):
    assert script(letter) == name


def test_writing_counts_lengths_scripts_and_repetitions():
    writing = Writing()
    for text in ("ab cd", "яя", "ab cd", "中文 字"):
        writing.add(text)
    assert writing.summary() == {
        "count": 4,
        "characters": {"min": 2, "median": 4, "p99": 5, "max": 5},
        "words": {"min": 1, "median": 2, "p99": 2, "max": 2},
        "repeated": 1,
        "scripts": {"Latin": 8 / 13, "Han": 3 / 13, "Cyrillic": 2 / 13},
    }


def test_too_many_classes_are_not_all_counted(monkeypatch):
    monkeypatch.setattr("beitctl.inspecting.counting.MAX_CLASSES", 2)
    classes = Classes()
    for label in "aabc":
        classes.add(label)
    assert classes.summary()["count"] == 2
    assert classes.summary()["complete"] is False


def test_a_check_counts_what_examples_have():
    rows = [
        *examples(3),
        Example("t", text="prose"),
        Example("p", picture(500, 300, "PNG", mode="RGBA"), label="c"),
    ]
    report = checked(rows)
    assert {key: value for key, value in report["with"].items() if value} == {
        "image": 4, "captions": 3, "text": 1, "label": 4,
    }  # fmt: skip
    assert report["pictures"]["formats"] == {"JPEG": 3, "PNG": 1}
    assert report["pictures"]["modes"] == {"RGB": 3, "RGBA": 1}
    assert report["pictures"]["width"] == {"min": 40, "median": 40, "p99": 500, "max": 500}
    assert report["pictures"]["smaller_than"] == {"64": 0.75, "224": 0.75}
    assert (report["pictures"]["transparent"], report["pictures"]["animated"]) == (1, 0)
    assert report["classes"]["largest"] == ("a", 2)
    assert report["captions"]["per_example"]["max"] == 1
    assert report["text"]["count"] == 1
    assert report["bytes"] == sum(len(e.image or b"") for e in rows) + 3 * len("caption 0") + len("prose")


def test_special_pictures_are_counted():
    moving = io.BytesIO()
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(moving, "GIF", save_all=True, append_images=[second])
    cmyk = picture(mode="CMYK")
    report = checked([Example("m", moving.getvalue()), Example("c", cmyk)])
    assert (report["pictures"]["animated"], report["pictures"]["cmyk"]) == (1, 1)


def test_a_picture_is_as_large_as_it_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    report = checked([Example("x", picture(40, 30, exif=exif))])
    assert (report["pictures"]["width"]["max"], report["pictures"]["height"]["max"]) == (30, 40)


def test_broken_examples_are_listed_with_reasons(tmp_path):
    rows = [
        *examples(1), BROKEN, Example("cut", picture()[:400]), Example("gone", tmp_path / "none.jpg"),
        Example("half", picture(), ("\ud83d",)), Example("second", picture(), second=b"x"),
        Example("map", picture(), segmentation=b"x"),
    ]  # fmt: skip
    report = checked(rows)
    reasons = {row["id"]: row["reason"] for row in report["broken"]["first"]}
    assert reasons["#1"] == "#1: not a readable picture (cut off)"
    assert reasons["cut"].startswith("not a readable picture (")
    assert reasons["gone"] == "cannot be read (No such file or directory)"
    assert reasons["half"] == r"not valid Unicode: '\ud83d'"
    assert reasons["second"] == "not a readable picture (unknown format)"
    assert reasons["map"] == "segmentation: not a readable picture (unknown format)"
    assert (report["broken"]["count"], report["broken"]["share"]) == (6, 6 / 7)


def test_changed_data_end_a_check():
    with pytest.raises(ChangedError):
        checked([ChangedError("x has changed")])


def test_copies_are_found_byte_for_byte():
    one, two = picture(seed=1), picture(seed=2)
    rows = [Example("a", one), Example("b", two), Example("c", one), Example("d", one)]
    assert checked(rows)["duplicates"] == {"groups": 1, "extra": 2, "first": [["a", "c", "d"]]}


def test_two_questions_about_one_picture_are_no_copies():
    rows = [Example("a", picture(), text="what?"), Example("b", picture(), text="who?")]
    assert checked(rows)["duplicates"]["groups"] == 0


def test_a_limited_check_looks_evenly():
    source, opened = found(examples(10))
    report = check(source, opened, limit=3)
    assert (report["examples"], report["checked"], report["classes"]["count"]) == (10, 3, 2)


def test_what_a_source_left_out_and_ignored_is_in_the_report():
    report = checked(examples(1), problems=["x:1: no caption"], ignored={".txt": 3})
    assert report["left_out"] == {"count": 1, "first": ["x:1: no caption"]}
    assert report["ignored"] == {".txt": 3}


def test_a_check_is_the_same_with_any_number_of_threads():
    rows = [*examples(40), BROKEN]
    source, opened = found(rows)
    assert check(source, opened, workers=1) == check(source, opened, workers=5)


@pytest.mark.parametrize(("rows", "share"), [([BROKEN], 1.0), ([], 1.0), ([*examples(3), BROKEN], 0.2)])
def test_data_that_cannot_be_trained_on_are_refused(rows, share):
    report = checked(rows)
    with pytest.raises(DataError):
        refuse(report, "x", share)


def test_few_broken_examples_are_not_refused():
    refuse(checked([*examples(3), BROKEN]), "x", 0.25)


def test_a_report_fits_into_80_columns(capsys):
    rows = [
        *examples(4), BROKEN, Example("n" * 200 + "\n", b"no picture"), Example("copy", picture(seed=1)),
        Example("t", text="prose " * 30, label="l" * 100),
    ]  # fmt: skip
    show(checked(rows, problems=["p" * 300], ignored={".txt": 3}))
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == 'source = { kind = "made", path = "x.made" }'
    assert max(map(len, lines)) <= 80
    for title in ("pictures", "classes", "captions", "text", "broken", "duplicates", "left out", "ignored"):
        assert title in lines


def test_control_characters_are_shown_escaped_and_long_names_lose_their_middle():
    assert printable("a\n\x1b[1m\udce9") == r"a\n\x1b[1m\xe9"
    assert printable("abcdefghij", 6) == "ab…hij"


def test_bytes_for_people():
    assert [size(999), size(1500), size(2_500_000_000)] == ["999 bytes", "1.5 kB", "2.5 GB"]


def test_a_sheet_shows_pictures_texts_and_what_is_broken():
    rows = [
        *examples(3),
        Example("t", text="prose"),
        BROKEN,
        Example("two", picture(), second=picture(30, 60)),
    ]
    with Image.open(io.BytesIO(sheet(Opened(rows), "x"))) as drawn:
        assert drawn.format == "PNG"
        pixels = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    assert (pixels == (0xD5, 0x5E, 0)).all(axis=1).any()  # the frame of the broken one


def test_a_sheet_is_the_same_every_time():
    opened = Opened(examples(20))
    assert sheet(opened, "x", count=5, seed=1) == sheet(opened, "x", count=5, seed=1)


def test_examples_of_a_sheet_are_evenly_spread_or_random_and_each_once():
    assert list(chosen(10, 5, None)) == [0, 2, 4, 6, 8]
    some = chosen(1000, 50, 3)
    assert list(some) == sorted(set(some))
    assert list(some) == list(chosen(1000, 50, 3)) != list(chosen(1000, 50, 4))
    assert list(chosen(3, 5, 1)) == [0, 1, 2]


def test_a_sheet_of_nothing_readable_is_refused():
    with pytest.raises(DataError, match="none of 1 examples can be read"):
        sheet(Opened([BROKEN]), "x")


def test_a_look_at_an_example_without_pictures_decodes_nothing():
    seen = look(Opened([Example("t", text="x")]), 0, Pictures())
    assert (seen.id, seen.pictures, seen.digest, seen.reason) == ("t", (), b"", "")
