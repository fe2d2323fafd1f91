from __future__ import annotations

import pytest

from rayscan.model.schedule import warmed_cosine


def test_up_in_a_line_and_down_along_half_a_cosine() -> None:
    rates = [warmed_cosine(step, 110, 10, 3.0, 1.0) for step in range(110)]
    assert rates[0] == pytest.approx(1.2) and rates[4] == pytest.approx(2.0)
    assert rates[9] == rates[10] == 3.0
    assert rates[60] == pytest.approx(2.0) and 1 < rates[-1] < 1.001
    assert warmed_cosine(0, 5, 0, 2.0) == 2.0
