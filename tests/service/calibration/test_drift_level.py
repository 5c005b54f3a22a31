"""The level of the drift tests: each of the two has half of it, by the numbers on either side."""

from __future__ import annotations

import numpy as np
import pytest

from service.calibration.drift_monitor import MonitorState
from service.calibration.exchangeability import ks_two_sample

N = 999


def shifted(count: int) -> np.ndarray:
    """200 evenly spaced ranks, ``count`` of them moved to the lowest tenth."""
    ranks = np.linspace(0, N, 200).astype(np.int64)
    ranks[len(ranks) - count :] = np.arange(count) % (N // 10)
    return ranks


@pytest.mark.parametrize(("count", "alarms"), [(21, False), (22, True)])
def test_the_kolmogorov_smirnov_test_alarms_at_half_of_the_level(count, alarms):
    """At a level of 0.05, p-values of 0.036 and of 0.024."""
    p_value = ks_two_sample(shifted(count), N)[1]
    assert (0.01 < p_value <= 0.025) if alarms else (0.025 < p_value < 0.05)
    assert MonitorState(N, 200, shifted(count), 0.0, 0.0).judge(0.05).ks_alarm == alarms


@pytest.mark.parametrize(("value", "alarms"), [(39.0, False), (41.0, True)])
def test_the_martingale_alarms_from_the_inverse_of_half_of_the_level(value, alarms):
    finding = MonitorState(N, 200, shifted(0), np.log10(value), 5.0).judge(0.05)
    assert (finding.martingale_alarm, finding.ks_alarm, finding.drifting) == (alarms, False, alarms)


def test_the_histogram_counts_p_values_up_to_each_tenth():
    """(1 + r)/5 for the ranks r against four scores; against nine, each tenth is a bin's upper end."""
    assert MonitorState(4, 5, np.arange(5), 0.0, 0.0).histogram == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert MonitorState(9, 10, np.arange(10), 0.0, 0.0).histogram == [1] * 10
