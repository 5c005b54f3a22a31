"""Test whether recent scores are still exchangeable with the calibration scores: two tests, based on ranks alone.

The *rank* of a score is the number r ∈ {0 … n} of calibration scores ranked above it, so that its conformal p-value is
(1 + r)/(n + 1). All p-values share one calibration set and are therefore dependent: given the calibration they are not
quite uniform, and a test that takes them for independent uniform numbers alarms on any long stream of inliers.
Both tests here account for that. ``ks_two_sample`` has the finite calibration sample in its null distribution, and
``Urn`` turns dependent ranks into independent uniform numbers, which ``Martingale`` then bets against.
"""

from __future__ import annotations

import math

import numpy as np

BETS = ((1 / 8, 1.0), (1 / 2, 1.0), (2.0, 1.0), (1.0, 1 / 2), (1.0, 2.0), (2.0, 2.0), (1 / 2, 1 / 2))
"""Parameters (a, b) of the Beta densities that the martingale bets with. With b = 1 they are the power bets ε p^(ε−1)
of Vovk, Nouretdinov & Gammerman 2003: on far more small p-values, on somewhat more, and on more large ones. (1, 1/2)
and (1, 2) mirror them; (2, 2) and (1/2, 1/2) bet on scores that spread less, or more, than the calibration's."""


def ks_two_sample(ranks: np.ndarray, n: int) -> tuple[float, float]:
    """Compute the two-sided Kolmogorov–Smirnov test of m recent scores against n calibration scores: (D, p-value).

    D = sup_t |F_m(t) − G_n(t)| depends on the ranks, int64 [m] with m ≥ 1, alone. Its null distribution is that of two
    samples, with the effective size mn/(m + n), which accounts for the calibration's own error. The p-value is
    Kolmogorov's limit at √(mn/(m + n)) D without Stephens's correction. Compared with the exact distribution for m from
    1 to 1000 and n from 50 to 3000, tails up to ½ of the limit are never too small (3% too large for m = 1000, n = 3000
    at 10⁻³; more in small samples), whereas with the correction they are too small by a tenth and more.
    """
    m = len(ranks)
    above = np.sort(ranks) / n
    steps = np.arange(m + 1) / m
    statistic = float(max(np.abs(steps[1:] - above).max(), np.abs(steps[:-1] - above).max()))
    return statistic, kolmogorov_tail(math.sqrt(m * n / (m + n)) * statistic)


def kolmogorov_tail(x: float) -> float:
    """Return P(K ≥ x) for Kolmogorov's distribution, the limit law of √n D_n.

    It is 2 Σ (−1)^(k−1) exp(−2k²x²) for x ≥ 1, and 1 − √(2π)/x Σ exp(−(2k−1)²π²/(8x²)) below: each series converges to
    float64's precision within five terms on its side.
    """
    if x < 0.04:  # the second series underflows: the tail is 1 − 10⁻³³⁰
        return 1.0
    if x < 1:
        return 1 - math.sqrt(2 * math.pi) / x * sum(
            math.exp(-(((2 * k - 1) * math.pi / x) ** 2) / 8) for k in range(1, 6)
        )
    return 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 6))


class Urn:
    """Turns ranks against one calibration set of size n into independent uniform p-values.

    If calibration and new scores are exchangeable and have no ties, the ranks follow Pólya's urn (Gazin, Blanchard &
    Roquain 2024, *Transductive conformal inference with adaptive scores*): after t of them,

        P(R = r | past) = (1 + #{past ranks = r}) / (n + 1 + t).

    The randomised probability integral transform of that law, p = P(R < r | past) + u P(R = r | past), is uniform and
    independent of the past. It is the smoothed p-value of Vovk et al. 2003 against the calibration *and* all scores
    seen since, up to the order within one rank. Memory is O(n), whatever t; a score costs O(log n) (Fenwick 1994).
    """

    def __init__(self, n: int) -> None:
        self._counts = [0] * (n + 1)
        self._tree = [0] * (n + 2)  # _tree[i] is the sum of the counts of the ranks i − (i & −i) … i − 1
        self._total = n + 1

    def p_value(self, rank: int, u: float) -> float:
        """Return the p-value in (0, 1] of the next rank, and add the rank to the urn.

        Args:
            rank: from 0 to n.
            u: a uniform random number in (0, 1].
        """
        p = (rank + self._below(rank) + u * (1 + self._counts[rank])) / self._total
        self._add(rank)
        return p

    def _below(self, rank: int) -> int:
        """Count the past ranks below ``rank``."""
        below = 0
        while rank:
            below += self._tree[rank]
            rank &= rank - 1
        return below

    def _add(self, rank: int) -> None:
        self._counts[rank] += 1
        self._total += 1
        node = rank + 1
        while node < len(self._tree):
            self._tree[node] += 1
            node += node & -node


class Martingale:
    """A bet against uniform p-values: M_t ≥ 0, M_0 = 1, E[M_t | past] = M_{t−1} if they are uniform and independent.

    By Ville's inequality P(M_t ≥ 1/α for any t) ≤ α, however often it is looked at. M is a mixture over the bet b
    (``BETS``) and over the time k from which the bet is made, with weights w_k = 1/(k(k + 1)):

        M_t = 1/(t + 1) + Σ_{k ≤ t} w_k (1/B) Σ_b Π_{i=k…t} f_b(p_i)

    The first term is the capital not yet bet. So M_t ≥ 1/(t + 1): after a long time without a change the test still has
    power, where a bet made from the start would have lost all its capital. The bets are those of Vovk, Nouretdinov &
    Gammerman 2003 (*Testing exchangeability on-line*); mixing over the onset is how Shin, Ramdas & Rinaldo 2023
    (*E-detectors*) look for a change.

    ``count`` is the number of p-values so far; ``log_value`` is log M now, ``log_maximum`` its maximum so far, in nats.
    """

    def __init__(self) -> None:
        self.count = 0
        self.log_value = 0.0
        self.log_maximum = 0.0
        self._log_capital = np.full(len(BETS), -np.inf)

    def bet(self, p: np.ndarray) -> None:
        """Bet on the next p-values, float64 [N] in [0, 1], in their order."""
        if not len(p):
            return
        t = self.count + 1.0 + np.arange(len(p))
        log_odds, log_inflow = log_bets(p), -np.log(t * (t + 1) * len(BETS))
        log_capital = np.empty_like(log_odds)
        for row in range(len(p)):
            self._log_capital = np.logaddexp(self._log_capital, log_inflow[row]) + log_odds[row]
            log_capital[row] = self._log_capital
        log_values = np.logaddexp(np.logaddexp.reduce(log_capital, axis=1), -np.log(t + 1))
        self.count += len(p)
        self.log_value = float(log_values[-1])
        self.log_maximum = max(self.log_maximum, float(log_values.max()))


def log_bets(p: np.ndarray) -> np.ndarray:
    """Return log f_b(p) of each bet b, float64 [N,B]; p is kept 2⁻⁵³ away from 0 and 1, where a bet may be infinite."""
    p = np.clip(p, 2.0**-53, 1 - 2.0**-53)[:, None]
    a, b = np.array(BETS).T
    return (a - 1) * np.log(p) + (b - 1) * np.log1p(-p) - _LOG_BETA


_LOG_BETA = np.array([math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b) for a, b in BETS])
