import numpy as np

from metaopt.streams.surprise import surprising_lines


def test_the_line_that_cost_more_than_its_length_comes_first():
    data = b"aa\nbbbb\ncc\n"
    nats = np.array([np.nan, 1, 1, 1, 1, 1, 1, 1, 4, 1, 1], np.float32) * np.log(2)
    found = surprising_lines(data, np.ones(11, int), -nats, 2)
    assert [(line.number, line.text) for line in found] == [(3, b"cc"), (2, b"bbbb")]
    np.testing.assert_allclose([line.bits for line in found], [6, 5], rtol=1e-6)
    np.testing.assert_allclose(found[0].excess, 6 - 3 * 13 / 11, rtol=1e-6)


def test_a_token_is_of_the_line_that_it_begins_in():
    found = surprising_lines(b"ab\ncd", np.array([1, 2, 2]), -np.array([0.0, 1.0, 3.0]), 5)
    assert [line.number for line in found] == [2, 1]
    np.testing.assert_allclose([line.bits * np.log(2) for line in found], [3, 1])
