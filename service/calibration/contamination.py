"""Calibration data that are not all good: a test of the scores' upper tail, and a calibration without its top.

Contamination makes conformal p-values too large: the promised false-positive rate stays kept (Bashari, Sesia & Romano
2025), but anomalies like the contaminants are missed. With n₁ contaminants among n scores, whatever they score,

    p ≤ α  ⇒  #{good calibration ≥ s} ≤ α(n + 1) − 1  ⇒  false-positive rate ≤ α (n + 1)/(n − n₁ + 1).

``contamination`` warns. The remedy that costs no guarantee is to look at the images it names and to calibrate again
without those that are indeed bad (label-trim, ibid.). ``trimmed`` removes them unseen, at a price that it states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.calibration.conformal import allowed_above
from service.errors import InvalidInput

LEAST_N = 50  # fewer leave too little of the upper half to extrapolate from
LARGEST_SHARE = 0.1  # of contaminants looked for: beyond it, a second mode is part of the data
LEVEL = 0.01
LEAST_SHAPE = 0.15  # ξ of the null tail is never taken lighter; 0 is exponential, 0.15 between gamma and log-normal
SHAPES = np.linspace(1e-3, 1.5, 32)  # the grid that a tail is fitted on
REPLICATES = 399
SEED = 20250207
MOST_TRIMMED = 0.5


@dataclass(frozen=True, eq=False)
class Contamination:
    """What the upper tail says. ``count`` is 0 unless it warns.

    ``share`` is count/n; ``indices`` (int64 [count]) are the suspects' places among the scores as given, the most
    extreme first; ``p_value`` is None where the scores cannot be judged; ``message`` is for the operator, None when
    there is nothing to say.
    """

    n: int
    count: int
    indices: np.ndarray
    p_value: float | None
    message: str | None

    @property
    def share(self) -> float:
        """Share of the scores that are suspected."""
        return self.count / self.n


@dataclass(frozen=True)
class _Scan:
    """For k = 1…K suspects: how far the k-th spacing, and the top k together, exceed the tail fitted to the rest."""

    gap: np.ndarray
    block: np.ndarray
    shape: float


def contamination(scores: np.ndarray) -> Contamination:
    """Do the highest scores belong to the tail of the others? ``scores`` float64 [n], finite, in any order.

    For every k up to n/10, a generalised Pareto law (peaks over threshold: Pickands 1975) is fitted to the scores
    above the median, the top k censored. Under it, the normalised log-spacings i·Δlog(1 + ξy/σ)/ξ of the top are
    independent Exp(1) (Rényi 1953). Two scans over k compare them with 1: the k-th spacing alone (a gap below a
    cluster of outliers) and the top k together (a block test: Sornette & Wei 2025). The null distribution of either
    maximum is simulated (399 replicates, fixed seed) from the law fitted to the scores between the median and the top
    tenth, with ξ one standard error up and never below 0.15. The smaller of the two p-values is doubled; at 0.01 it
    warns.

    Simulated warnings on clean scores, 120 sets at n = 100 and 300, 50 at 1000: none on normal, gamma(2), exponential,
    log-normal σ = ½, Student t₅ and 0.8 N(0, 1) + 0.2 N(3, 1); at n = 10 000 none in 10 sets each of the first four. On
    tails heavier than the body tells: log-normal σ = 1 3, 1 and 0%, t₃ 4, 7 and 4%, 0.8 N(0, 1) + 0.2 N(0, 9) 0, 0 and
    4%. At n = 10 000 the last two are told from contamination no more: 7 of 8 sets warn, rightly in that their top is
    not the tail of their body.

    Sets found, in %, with contaminants (1, 3 and 5% of n, spread 1 σ) so many σ above the median:

    ==================  ==============  ==============  ==============
    clean law, shift    n = 100         n = 300         n = 1000
    ==================  ==============  ==============  ==============
    normal, 6 σ          0, 13,  33      13,  75,  82    85, 100, 100
    normal, 10 σ         7, 92,  95     100, 100, 100   100, 100, 100
    gamma(2), 6 σ        0,  0,   0       0,   3,  10     5,  15,  30
    gamma(2), 10 σ       0, 35,  47      30,  82,  82    85, 100,   –
    ==================  ==============  ==============  ==============

    A tail like log-normal's hides moderate outliers: with σ = ½, n = 300, at 10 σ, 17, 68 and 67% are found.
    """
    values = _checked(scores)
    n, order = len(values), np.argsort(values, kind="stable")
    if n < LEAST_N:
        return _unjudged(n, f"{n} calibration scores are too few to tell contamination from a tail: {LEAST_N} needed")
    upper = values[order[n - n // 2 :]] - values[order[n - n // 2 - 1]]
    if np.median(upper) <= 0:
        return _unjudged(n, "most of the upper calibration scores are equal: no tail to judge contamination by")
    largest = int(LARGEST_SHARE * n)
    found = _scan(upper, largest)
    gap_p, block_p = _null_p_values(found, len(upper), largest)
    p_value = min(1.0, 2 * min(gap_p, block_p))
    if p_value > LEVEL:
        return Contamination(n, 0, np.empty(0, np.int64), p_value, None)
    # The block overstates the count, since it takes inliers in as long as the sum is large; the widest gap ends it.
    within = int(np.argmax(found.block if block_p < gap_p else found.gap)) + 1
    count = int(np.argmax(found.gap[:within])) + 1
    return Contamination(n, count, order[::-1][:count], p_value, _warning(n, count, p_value))


def trimmed(scores: np.ndarray, share: float) -> np.ndarray:
    """``scores`` in ascending order without the t = round(share · n) highest: float64 [n − t], a robust calibration.

    Trimming makes p-values smaller and so gives away part of the guarantee: ``rate_after_trimming`` says how much.
    Raises InvalidInput for scores that are not finite [n], n ≥ 1, or a share outside [0, 0.5].
    """
    values = np.sort(_checked(scores))
    if not 0 <= share <= MOST_TRIMMED:
        raise InvalidInput(f"share to trim is {share}, expected a number from 0 to {MOST_TRIMMED}")
    return values[: len(values) - round(share * len(values))]


def rate_after_trimming(rate: float, n: int, removed: int, contaminants: int | None = None) -> float:
    """Largest false-positive rate of flagging p ≤ ``rate`` against n scores whose ``removed`` = t highest were trimmed.

    With l = ⌊rate (n − t + 1)⌋, p ≤ rate ⇔ at most l − 1 of the kept scores are ≥ s ⇒ at most l − 1 + t' of the good
    scores are, t' being the good ones that were removed. For n₁ contaminants a new inlier is exchangeable with the
    n − n₁ good scores, and therefore the rate is at most (l + t')/(n − n₁ + 1), for l ≥ 1.

    - ``contaminants`` None: at most t, whatever they score. t' ≤ t, so (l + t)/(n − t + 1) ≤ rate + t/(n − t + 1).
    - ``contaminants`` n₁ ≤ t, all among the t highest: t' = t − n₁, so (l + t − n₁)/(n − n₁ + 1). With n₁ = t the full
      guarantee; with n₁ = 0 (clean data, trimmed in vain) rate + t/(n + 1) less rounding, and without ties exactly so.

    0 when l = 0, where nothing can be flagged. Raises InvalidInput for counts that contradict each other.
    """
    given = 0 if contaminants is None else contaminants
    if not 0 <= given <= removed < n:
        raise InvalidInput(
            f"{removed} of {n} removed, {contaminants} contaminants: expected 0 ≤ contaminants ≤ removed < n"
        )
    above = allowed_above(n - removed, rate) + 1  # l
    if above < 1:
        return 0.0
    good = n - (removed if contaminants is None else contaminants)
    return min(1.0, (above + removed - given) / (good + 1))


def _scan(upper: np.ndarray, largest: int) -> _Scan:
    """Scan ascending exceedances ``upper`` [m] for 1…``largest`` suspects (Grimshaw's profile of the Pareto fit)."""
    m, k = len(upper), np.arange(largest + 1)
    tau = (2.0**SHAPES - 1) / np.median(upper)  # ξ/σ, such that the median exceedance fits
    logs = np.log1p(np.outer(tau, upper))
    sums, kept = np.cumsum(logs, axis=1), m - k
    total = sums[:, kept - 1] + k * logs[:, kept - 1]
    xi = total / kept  # of the censored likelihood, given τ
    profile = -kept * np.log(xi / tau[:, None]) - sums[:, kept - 1]
    best = profile.argmax(axis=0)
    shape = xi[best, k]
    edge = logs[best, kept - 1]
    spacing = k[1:] * (logs[best[1:], m - k[1:]] - edge[1:]) / shape[1:]
    block = (sums[best, -1] - sums[best, kept - 1] - k * edge)[1:] / shape[1:]
    return _Scan(kept[1:] * np.log1p(spacing / kept[1:]), _normal_score(block, k[1:], kept[1:]), float(shape[-1]))


def _normal_score(total: np.ndarray, k: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Of a sum of k Exp(1) over a scale fitted to ``kept``: F(2k, 2 kept), about normal (Paulson 1942)."""
    root, a, b = np.cbrt(total / k), 1 / (9 * k), 1 / (9 * kept)
    normal: np.ndarray = ((1 - b) * root - (1 - a)) / np.sqrt(b * root**2 + a)
    return normal


def _null_p_values(found: _Scan, m: int, largest: int) -> tuple[float, float]:
    """Monte-Carlo p-values of the maxima of the gap and block scans under the fitted Pareto tail."""
    xi = max(LEAST_SHAPE, found.shape + (1 + found.shape) / np.sqrt(m - largest))
    random = np.random.RandomState(SEED)
    higher = np.zeros(2)
    for _ in range(REPLICATES):
        null = _scan(np.sort(np.expm1(-xi * np.log(1 - random.random_sample(m))) / xi), largest)
        higher += null.gap.max() >= found.gap.max(), null.block.max() >= found.block.max()
    gap, block = (1 + higher) / (REPLICATES + 1)
    return float(gap), float(block)


def _warning(n: int, count: int, p_value: float) -> str:
    return (
        f"the {count} highest of {n} calibration scores ({count / n:.1%}) lie above the tail of the others "
        f"(p = {p_value:.2g}): look at these images and calibrate again without the bad ones, or trim them"
    )


def _unjudged(n: int, message: str) -> Contamination:
    return Contamination(n, 0, np.empty(0, np.int64), None, message)


def _checked(scores: np.ndarray) -> np.ndarray:
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise InvalidInput("calibration scores: expected [n], n ≥ 1, finite")
    return values
