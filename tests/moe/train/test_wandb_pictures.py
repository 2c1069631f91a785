"""Pictures of expert load: what a cell's colour and a histogram's bin say."""

from __future__ import annotations

import numpy as np

from moe.train.wandb_pictures import load_histogram, load_picture


def test_the_picture_shows_dead_ideal_and_crowded_experts_apart() -> None:
    picture = load_picture(np.array([[0.0, 1.0, 3.0, 0.0], [0.5, 1.0, 1.0, 1.5]]))
    size = picture.shape[0] // 2
    assert picture.shape == (2 * size, 4 * size, 3)
    cells = picture[size // 2 :: size, size // 2 :: size]
    assert cells[0, 0].tolist() == [0, 0, 0]
    assert cells[0, 1].tolist() == [255, 255, 255]
    assert cells[0, 2].tolist() == [5, 48, 97]
    assert cells[1, 0][0] > cells[1, 0][2], "orange is less than ideal"
    assert cells[1, 3][2] > cells[1, 3][0], "blue is more than ideal"


def test_a_histogram_counts_every_expert_once_between_the_same_edges() -> None:
    counts, edges = load_histogram(np.array([[0.0, 0.1, 1.0], [1.05, 9.0, 4.0]]))
    assert counts.sum() == 6
    assert (edges[0], edges[-1], len(edges)) == (0.0, 4.0, 33)
    assert counts[0] == 2, "below an eighth of the ideal"
    assert counts[8] == 2, "the ideal, up to an eighth more"
    assert counts[-1] == 2, "four times the ideal and more"
    assert np.array_equal(edges, load_histogram(np.ones(5))[1])
