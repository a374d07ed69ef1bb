import numpy as np
import pytest

from beitctl.errors import DataError
from beitctl.report import code_numbers, codes, figures
from beitctl.report.code_numbers import mutual_information, same_label, typical, usage, usage_of
from beitctl.report.events import EventLog, read


class Log:
    """Keeps what is written to it."""

    def __init__(self):
        self.figures, self.tables = {}, {}

    def figure(self, name, png, title, caption):
        assert title
        assert len(caption) > 100, "a caption explains"
        self.figures[name] = png

    def table(self, name, title, columns, rows):
        assert all(len(row) == len(columns) for row in rows)
        self.tables[name] = rows


def rng(seed=0):
    return np.random.default_rng(seed)


def pictures(n=12):
    """Pictures of 4 x 4 patches of one colour each."""
    return rng().integers(0, 256, (n, 3, 4, 4), dtype=np.uint8).repeat(8, 2).repeat(8, 3)


def told(size=8, n=12, **more):
    log = Log()
    drawn = rng().integers(0, size, (n, 16))
    found = codes.tell(log, views=pictures(n), codes=drawn, near=rng(1).random((n, 16)), size=size, **more)
    return log, found


def test_codes_in_even_use_have_their_number_as_perplexity():
    found = usage(np.arange(8).reshape(2, 4) // 2, 8)
    assert (found["used"], found["used_share"]) == (4, 0.5)
    assert found["perplexity"] == pytest.approx(4)
    assert found["entropy"] == pytest.approx(np.log(4))
    assert found["top_share"] == 0.25
    assert found["counts"].tolist() == [2, 2, 2, 2, 0, 0, 0, 0]


def test_one_used_code_has_perplexity_one():
    found = usage(np.full((3, 4), 5), 65_536)
    assert (found["used"], found["perplexity"], found["top_share"], found["entropy"]) == (1, 1, 1, 0)


def test_no_used_code_is_no_error():
    found = usage_of(np.zeros(4))
    assert (found["used"], found["perplexity"], found["top_share"], found["entropy"]) == (0, 0, 0, 0)


@pytest.mark.parametrize("counts", [np.zeros(0), np.array([1, -1]), np.array([1, np.nan]), np.zeros((2, 2))])
def test_counts_that_cannot_be_are_refused(counts):
    with pytest.raises(DataError, match="counts of codes"):
        usage_of(counts)


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (np.zeros((0, 4), int), r"shape \(0, 4\) holds no code"),
        (np.zeros((4, 0), int), r"shape \(4, 0\) holds no code"),
        (np.zeros(4, int), r"shape \(4,\) of int64; expected \(pictures, patches\)"),
        (np.zeros((2, 4)), "float64; expected"),
        (np.array([[0, 4]]), "found 4, but a codebook of 4 has 0 to 3"),
        (np.array([[0, -1]]), "found -1, but a codebook of 4 has 0 to 3"),
    ],
)
def test_codes_that_cannot_be_are_refused(drawn, message):
    with pytest.raises(DataError, match=message):
        usage(drawn, 4)


def test_codes_that_are_the_class_know_all_of_it():
    labels = np.repeat([0, 1, 2, 3], 25)
    found = mutual_information(np.repeat(labels[:, None], 9, 1), labels, 4)
    assert found["mutual_information"] == pytest.approx(np.log(4))
    assert found["label_entropy"] == pytest.approx(np.log(4))
    assert found["mutual_information_share"] == pytest.approx(1)


def test_mutual_information_is_that_of_the_joint_distribution():
    joint = np.array([[30, 10, 0], [5, 25, 30]])  # patches by class and code
    labels = np.repeat([0, 1], [4, 6])
    drawn = np.concatenate([np.repeat([0, 1, 2], row) for row in joint]).reshape(10, 10)
    p = joint / joint.sum()
    outer = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    expected = (p[p > 0] * np.log(p[p > 0] / outer[p > 0])).sum()
    assert mutual_information(drawn, labels, 3)["mutual_information"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [16, 1024, 65_536])
def test_independent_codes_know_nothing_above_chance_however_many_there_are(size):
    draw = rng()
    found = mutual_information(draw.integers(0, size, (300, 49)), draw.integers(0, 10, 300), size)
    assert found["mutual_information"] > 0, "plain counting always finds something"
    assert abs(found["mutual_information_above_chance"]) < 4 * found["mutual_information_chance_sd"]


def test_more_codes_raise_plain_mutual_information_by_counting_alone():
    draw = rng()
    labels = draw.integers(0, 10, 300)
    few, many = (mutual_information(draw.integers(0, size, (300, 49)), labels, size) for size in (16, 4096))
    assert many["mutual_information"] > 10 * few["mutual_information"]


def test_labels_are_shuffled_among_pictures_not_patches():
    """Each picture has a code of its own: any labels are known, so nothing is above chance."""
    drawn = np.repeat(np.arange(40)[:, None], 16, 1)
    found = mutual_information(drawn, np.arange(40) % 4, 40)
    assert found["mutual_information"] == pytest.approx(np.log(4))
    assert found["mutual_information_above_chance"] == pytest.approx(0, abs=1e-12)


def test_one_class_holds_no_information():
    found = mutual_information(rng().integers(0, 8, (5, 4)), np.full(5, 7), 8)
    assert found["mutual_information"] == found["label_entropy"] == found["mutual_information_share"] == 0


def test_pictures_without_label_are_left_out_and_counted():
    draw = rng()
    drawn, labels = draw.integers(0, 8, (30, 16)), draw.integers(0, 3, 30)
    part = np.where(np.arange(30) < 20, labels, -1)
    found = mutual_information(drawn, part, 8)
    alone = mutual_information(drawn[:20], labels[:20], 8)
    assert (found["labelled"], found["unlabelled"], alone["unlabelled"]) == (20, 10, 0)
    assert {**found, "unlabelled": 0} == alone


def test_mutual_information_without_any_label_is_zero():
    found = mutual_information(np.zeros((3, 4), int), np.full(3, -1), 8)
    assert (found["mutual_information"], found["classes"], found["labelled"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(2, int), r"shape \(2,\).*each of 3 pictures"),
        (np.zeros(3), "float64"),
        (np.array([0, 1, -2]), "found -2"),
    ],
)
def test_labels_that_cannot_be_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        mutual_information(np.zeros((3, 4), int), labels, 8)


def test_typical_codes_are_those_of_the_class():
    drawn = rng().integers(0, 4, (20, 16))
    drawn[:10, :2], drawn[10:, :2] = 6, 7
    rows = typical(drawn, np.repeat([0, 1], 10), 8, ["cat", "dog"])
    assert [row[:2] for row in rows] == [["cat", 10], ["dog", 10]]
    assert rows[0][2].startswith("6 (2.0×)")
    assert rows[1][2].startswith("7 (2.0×)")


def test_a_code_of_a_single_picture_is_not_typical():
    drawn = np.zeros((8, 4), int)
    drawn[0] = 5
    assert typical(drawn, np.repeat([0, 1], 4), 8) == [["0", 4, "–"], ["1", 4, "0 (1.1×)"]]


def test_a_class_without_name_is_refused():
    with pytest.raises(DataError, match="found class 2, but there are 2 names"):
        typical(np.zeros((2, 4), int), np.array([0, 2]), 4, ["a", "b"])


def test_pictures_of_a_class_that_share_codes_are_nearest():
    labels = np.repeat([0, 1], 10)
    found = same_label(rng().integers(0, 4, (20, 16)) + 4 * labels[:, None], labels, 8)
    assert found["nearest_same_label"] == 1
    assert found["nearest_chance"] == pytest.approx(9 / 19)


def test_pictures_that_are_all_alike_are_as_good_as_chance():
    labels = np.repeat([0, 1, 2], [10, 5, 1])
    found = same_label(np.zeros((16, 4), int), labels, 4)
    assert found["nearest_same_label"] == pytest.approx(found["nearest_chance"])


def test_the_nearest_picture_is_never_the_picture_itself():
    drawn = rng().integers(0, 50, (30, 16))
    assert same_label(drawn, np.arange(30), 50)["nearest_same_label"] == 0
    found, _ = code_numbers.neighbours(drawn, 50, np.arange(30), 29)
    assert all(sorted([query, *others]) == list(range(30)) for query, others in enumerate(found))


def test_order_and_place_of_patches_do_not_matter():
    drawn = rng().integers(0, 50, (20, 16))
    drawn[19] = drawn[3][::-1]
    found, alike = code_numbers.neighbours(drawn, 50, np.array([3]), 1)
    assert found[0, 0] == 19
    assert alike[0, 0] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("size", [5, 40, 3000])
def test_sparse_and_dense_comparison_agree_with_plain_cosines(size, monkeypatch):
    drawn = rng().integers(0, size, (40, 16))
    counts = np.stack([np.bincount(row, minlength=size) for row in drawn]).astype(float)
    rows = counts * (np.log(41 / (1 + (counts > 0).sum(0))) + 1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for cost in (0, 1e9):
        monkeypatch.setattr(code_numbers, "SPARSE_COST", cost)
        alike = code_numbers.likeness(code_numbers.bag(drawn, size))(np.arange(40))
        assert np.abs(alike - rows @ rows.T).max() < 1e-6


def test_more_pictures_than_are_compared_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(code_numbers, "MOST_COMPARED", 10)
    labels = np.repeat([0, 1], 20)
    found = same_label(np.repeat(labels[:, None], 4, 1), labels, 2)
    assert found["nearest_pictures"] == 10
    assert found["nearest_chance"] == pytest.approx(4 / 9), "five of each class"


def test_one_labelled_picture_has_no_neighbour():
    found = same_label(np.zeros((3, 4), int), np.array([0, -1, -1]), 4)
    assert (found["nearest_same_label"], found["nearest_pictures"]) == (0, 1)


ALL = {
    "labels": np.arange(12) % 4 - 1,
    "names": ["a", "b", "c"],
    "cosine": np.full((5, 4, 4), 0.5),
    "windows": [(10, np.ones(8))],
}


@pytest.fixture(scope="module")
def everything():
    return told(**ALL)


def test_tell_writes_all_that_its_inputs_allow(everything):
    log, found = everything
    assert set(log.figures) == {
        "code-histogram", "code-usage", "code-patches", "code-similarity", "code-nearest",
    }  # fmt: skip
    assert set(log.tables) == {"code-meaning", "code-classes"}
    assert all(png.startswith(b"\x89PNG") and len(png) <= figures.MAX_BYTES for png in log.figures.values())
    assert {"codebook_used", "used_share", "codebook_perplexity", "mutual_information", "label_entropy",
            "mutual_information_chance", "nearest_same_label", "nearest_chance"} <= set(found)  # fmt: skip
    assert found["teacher_cosine"] == 0.5
    assert all(isinstance(value, float) for value in found.values())


def test_tell_without_labels_says_nothing_about_classes():
    log, found = told()
    assert set(log.figures) == {"code-histogram", "code-patches", "code-nearest"}
    assert not log.tables
    assert not any(name.startswith(("mutual", "nearest", "label")) for name in found)


@pytest.mark.parametrize("labels", [np.full(12, -1), np.full(12, 4)])
def test_tell_with_fewer_than_two_classes_says_nothing_about_classes(labels):
    log, found = told(labels=labels)
    assert not log.tables
    assert "mutual_information" not in found


def test_tell_is_the_same_every_time(everything):
    again = told(**ALL)
    assert again[1] == everything[1]
    assert again[0].figures == everything[0].figures
    assert again[0].tables == everything[0].tables


def test_tell_takes_one_picture_and_one_used_code():
    log = Log()
    found = codes.tell(
        log, views=pictures(1), codes=np.zeros((1, 16), np.uint16), near=np.zeros((1, 16)), size=65_536,
        labels=np.array([0]),
    )  # fmt: skip
    assert found["codebook_used"] == 1
    assert "code-nearest" not in log.figures, "one picture has no neighbour"


def test_tell_takes_fewer_views_than_codes():
    labels = np.arange(12) % 2
    log = Log()
    drawn = rng().integers(0, 8, (12, 16))
    found = codes.tell(log, views=pictures(3), codes=drawn, near=np.zeros((12, 16)), size=8, labels=labels)
    assert found["labelled"] == 12
    assert "code-nearest" in log.figures


def test_names_that_do_not_reach_the_labels_are_refused():
    with pytest.raises(DataError, match="found class 2, but there are 1 names"):
        told(labels=np.arange(12) % 3, names=["a"])


def test_a_steep_histogram_is_logarithmic():
    level, steep = Log(), Log()
    drawn = np.zeros((4, 16), int)
    for log, size in ((level, 4), (steep, 64)):
        codes.tell(log, views=pictures(4), codes=drawn, near=np.zeros((4, 16)), size=size)
    plain = figures.histogram(np.bincount(drawn.ravel(), minlength=64), "", "code")
    assert steep.figures["code-histogram"] != plain
    assert level.figures["code-histogram"] == figures.histogram(np.array([64, 0, 0, 0]), "", "code")


def test_the_page_goes_through_a_real_log(tmp_path):
    with EventLog(tmp_path, stage="train-tokenizer", recipe="r", run="x", quiet=True) as log:
        codes.tell(
            log, views=pictures(), codes=rng().integers(0, 8, (12, 16)), near=np.zeros((12, 16)), size=8
        )
    images = [record for record in read(tmp_path) if record["event"] == "image"]
    assert {record["name"] for record in images} == {"code-histogram", "code-patches", "code-nearest"}
    assert all((tmp_path / record["path"]).is_file() for record in images)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (np.zeros((2, 3, 32, 48), np.uint8), "32 x 48 pixels; expected squares"),
        (np.zeros((2, 3, 30, 30), np.uint8), "30 x 30 pixels; expected squares with a side .* multiple of 4"),
        (np.zeros((2, 1, 32, 32), np.uint8), r"shape \(2, 1, 32, 32\)"),
        (np.zeros((2, 3, 32, 32)), "float64"),
        (np.zeros((0, 3, 32, 32), np.uint8), "at least one"),
    ],
)
def test_views_that_do_not_fit_are_refused(views, message):
    with pytest.raises(DataError, match=message):
        codes.tell(Log(), views=views, codes=np.zeros((2, 16), int), near=np.zeros((2, 16)), size=4)


def test_class_numbers_may_be_large():
    log, found = told(labels=np.where(np.arange(12) % 2, 10**12, -1))
    assert "mutual_information" not in found
    assert log.figures["code-patches"].startswith(b"\x89PNG")
