"""Detect anomalies among the calibration data by the upper tail of their scores, and calibrate without the highest.

Anomalies among the calibration data (contaminants) make conformal p-values too large. The promised false-positive rate
is still kept (Bashari, Sesia & Romano 2025), but anomalies like the contaminants are missed. With n₁ contaminants among
n scores, whatever they score,

    p ≤ α  ⇒  #{inlier calibration ≥ s} ≤ α(n + 1) − 1  ⇒  false-positive rate ≤ α (n + 1)/(n − n₁ + 1).

``contamination`` warns. To keep the guarantee, look at the images that it names, and calibrate again without those that
are anomalies indeed (label-trim, ibid.). ``trimmed`` removes the highest scores without a look, and
``rate_after_trimming`` bounds what that costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.calibration.conformal import max_calibration_above
from service.errors import InvalidInput

MIN_SCORES = 50  # with fewer, the upper half is too small to extrapolate from
MAX_SHARE = 0.1  # of contaminants that are looked for; a larger second mode is taken for part of the data
LEVEL = 0.01  # p-value at which it warns
LEAST_SHAPE = 0.15  # least ξ of the tail under the null; 0 is exponential, 0.15 lies between gamma and log-normal
SHAPES = np.linspace(1e-3, 1.5, 32)  # grid of ξ on which a tail is fitted
REPLICATES = 399
SEED = 20250207
MAX_TRIMMED = 0.5  # share of the scores


@dataclass(frozen=True, eq=False)
class Contamination:
    """The result of the test for contaminants among n calibration scores.

    Args:
        n: number of scores.
        count: number of suspected scores, 0 unless the test warns.
        indices: indices of the suspected scores in the order given, the highest first; int64 [count].
        p_value: of the null hypothesis that there are no contaminants; None if the scores cannot be judged.
        message: text for the operator; None if there is nothing to report.
    """

    n: int
    count: int
    indices: np.ndarray
    p_value: float | None
    message: str | None

    @property
    def share(self) -> float:
        """Share of suspected scores, count/n."""
        return self.count / self.n


@dataclass(frozen=True)
class _Scan:
    """Statistics of how far the k highest scores exceed a Pareto tail fitted to the others, for k = 1…K.

    Args:
        gap: of the k-th log-spacing alone, float64 [K].
        block: of the top k log-spacings together, float64 [K].
        shape: ξ of the tail that is fitted below all K suspects.
    """

    gap: np.ndarray
    block: np.ndarray
    shape: float


def contamination(scores: np.ndarray) -> Contamination:
    """Test whether the highest of n scores, float64 [n] in any order, belong to the tail of the others.

    For every k up to n/10, a generalised Pareto law (peaks over threshold: Pickands 1975) is fitted to the scores
    above the median, the top k censored. Under it, the normalised log-spacings i·Δlog(1 + ξy/σ)/ξ of the top are
    independent Exp(1) (Rényi 1953). Two scans over k compare them with 1: the k-th spacing alone (a gap below a
    cluster of outliers) and the top k together (a block test: Sornette & Wei 2025). The null distribution of either
    maximum is simulated (399 replicates, fixed seed) from the law fitted to the scores between the median and the top
    tenth, with ξ one standard error up and never below 0.15. The smaller of the two p-values is doubled; at 0.01 the
    test warns.

    False warnings in simulations of clean scores, 120 sets at n = 100 and 300, 50 at 1000: none on normal, gamma(2),
    exponential, log-normal σ = ½, Student t₅ and 0.8 N(0, 1) + 0.2 N(3, 1); at n = 10 000 none in 10 sets each of the
    first four. On tails heavier than the body suggests, in % at n = 100, 300 and 1000: log-normal σ = 1 has 3, 1 and 0;
    t₃ 4, 7 and 4; 0.8 N(0, 1) + 0.2 N(0, 9) 0, 0 and 4. At n = 10 000 the last two cannot be told from contamination: 7
    of 8 sets warn, rightly in that their top is not the tail of their body.

    Share of simulated sets in which contaminants are detected, in %, for 1, 3 and 5% of contaminants (spread 1 σ) that
    many σ above the median:

    ==================  ==============  ==============  ==============
    clean law, shift    n = 100         n = 300         n = 1000
    ==================  ==============  ==============  ==============
    normal, 6 σ          0, 13,  33      13,  75,  82    85, 100, 100
    normal, 10 σ         7, 92,  95     100, 100, 100   100, 100, 100
    gamma(2), 6 σ        0,  0,   0       0,   3,  10     5,  15,  30
    gamma(2), 10 σ       0, 35,  47      30,  82,  82    85, 100,   –
    ==================  ==============  ==============  ==============

    A tail like log-normal's hides moderate outliers: with σ = ½, n = 300, at 10 σ, 17, 68 and 67% are detected.

    Raises:
        InvalidInput: the scores are not finite [n], n ≥ 1.
    """
    values = _checked(scores)
    n, order = len(values), np.argsort(values, kind="stable")
    if n < MIN_SCORES:
        return _unjudged(
            n, f"{n} calibration scores are too few to tell contamination from a tail: {MIN_SCORES} needed"
        )
    upper = values[order[n - n // 2 :]] - values[order[n - n // 2 - 1]]
    if np.median(upper) <= 0:
        return _unjudged(n, "most of the upper calibration scores are equal: no tail to judge contamination by")
    max_count = int(MAX_SHARE * n)
    scan = _scan(upper, max_count)
    gap_p, block_p = _null_p_values(scan, len(upper), max_count)
    p_value = min(1.0, 2 * min(gap_p, block_p))
    if p_value > LEVEL:
        return Contamination(n, 0, np.empty(0, np.int64), p_value, None)
    # The block test overstates the count, since inliers below the contaminants hardly lower the sum. The widest gap
    # within it is where the contaminants end.
    within = int(np.argmax(scan.block if block_p < gap_p else scan.gap)) + 1
    count = int(np.argmax(scan.gap[:within])) + 1
    return Contamination(n, count, order[::-1][:count], p_value, _warning(n, count, p_value))


def trimmed(scores: np.ndarray, share: float) -> np.ndarray:
    """Return the scores in ascending order without the t = round(share · n) highest, float64 [n − t].

    Trimming makes p-values smaller and so gives up part of the guarantee; ``rate_after_trimming`` says how much.

    Raises:
        InvalidInput: the scores are not finite [n], n ≥ 1, or the share is outside [0, 0.5].
    """
    values = np.sort(_checked(scores))
    if not 0 <= share <= MAX_TRIMMED:
        raise InvalidInput(f"share to trim is {share}, expected a number from 0 to {MAX_TRIMMED}")
    return values[: len(values) - round(share * len(values))]


def rate_after_trimming(rate: float, n: int, removed: int, contaminants: int | None = None) -> float:
    """Bound the false-positive rate of flagging p ≤ ``rate`` after trimming the t = ``removed`` highest of n scores.

    With l = ⌊rate (n − t + 1)⌋, p ≤ rate ⇔ at most l − 1 of the kept scores are ≥ s ⇒ at most l − 1 + t' of the
    inliers' scores are, t' being those of inliers that were removed. For n₁ contaminants a new inlier is exchangeable
    with the n − n₁ inliers, and therefore the rate is at most (l + t')/(n − n₁ + 1), for l ≥ 1.

    - ``contaminants`` None: at most t, whatever they score. t' ≤ t, so (l + t)/(n − t + 1) ≤ rate + t/(n − t + 1).
    - ``contaminants`` n₁ ≤ t, all among the t highest: t' = t − n₁, so (l + t − n₁)/(n − n₁ + 1). With n₁ = t the full
      guarantee; with n₁ = 0 (clean data, trimmed in vain) rate + t/(n + 1) less rounding, and without ties exactly so.

    The bound is 0 if l = 0, where nothing can be flagged.

    Raises:
        InvalidInput: the counts contradict each other.
    """
    stated = 0 if contaminants is None else contaminants
    if not 0 <= stated <= removed < n:
        raise InvalidInput(
            f"{removed} of {n} removed, {contaminants} contaminants: expected 0 ≤ contaminants ≤ removed < n"
        )
    rank = max_calibration_above(n - removed, rate) + 1  # l
    if rank < 1:
        return 0.0
    n_inliers = n - (removed if contaminants is None else contaminants)
    return min(1.0, (rank + removed - stated) / (n_inliers + 1))


def _scan(upper: np.ndarray, max_count: int) -> _Scan:
    """Scan ascending exceedances ``upper`` [m] for 1…``max_count`` suspects, the Pareto fit by Grimshaw's profile."""
    m, k = len(upper), np.arange(max_count + 1)
    tau = (2.0**SHAPES - 1) / np.median(upper)  # ξ/σ for which the law has the median of the exceedances
    logs = np.log1p(np.outer(tau, upper))
    sums, kept = np.cumsum(logs, axis=1), m - k
    total = sums[:, kept - 1] + k * logs[:, kept - 1]
    xi = total / kept  # maximises the censored likelihood for given τ
    profile = -kept * np.log(xi / tau[:, None]) - sums[:, kept - 1]
    best = profile.argmax(axis=0)
    shape = xi[best, k]
    edge = logs[best, kept - 1]
    spacing = k[1:] * (logs[best[1:], m - k[1:]] - edge[1:]) / shape[1:]
    block = (sums[best, -1] - sums[best, kept - 1] - k * edge)[1:] / shape[1:]
    return _Scan(kept[1:] * np.log1p(spacing / kept[1:]), _normal_score(block, k[1:], kept[1:]), float(shape[-1]))


def _normal_score(total: np.ndarray, k: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Turn sums of k Exp(1) over a scale fitted to ``kept`` others, F(2k, 2 kept), into z-scores (Paulson 1942)."""
    root, a, b = np.cbrt(total / k), 1 / (9 * k), 1 / (9 * kept)
    normal: np.ndarray = ((1 - b) * root - (1 - a)) / np.sqrt(b * root**2 + a)
    return normal


def _null_p_values(scan: _Scan, m: int, max_count: int) -> tuple[float, float]:
    """Return Monte-Carlo p-values of the maxima of the gap and block scans under the fitted Pareto tail."""
    xi = max(LEAST_SHAPE, scan.shape + (1 + scan.shape) / np.sqrt(m - max_count))
    random = np.random.RandomState(SEED)
    higher = np.zeros(2)
    for _ in range(REPLICATES):
        null = _scan(np.sort(np.expm1(-xi * np.log(1 - random.random_sample(m))) / xi), max_count)
        higher += null.gap.max() >= scan.gap.max(), null.block.max() >= scan.block.max()
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
