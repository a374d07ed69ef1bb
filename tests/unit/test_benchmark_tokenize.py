"""The benchmark of tokenize-images, at a size at which its numbers mean nothing."""

import json

from benchmarks import tokenize


def test_its_last_line_is_one_json_object_with_the_ratio(capsys):
    sizes = ["--width", "64", "--layers", "1", "--image-px", "32", "--pictures", "2", "--views", "2"]
    found = tokenize.main(sizes)
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == found
    assert len(lines) == 3
    assert found["views"] == 8
    assert found["ratio"] > 0
    assert found["stage_views_per_s"] > 0
