"""Could a difference between two models on the same questions be chance? Tests and intervals, no torch.

Everything here is about questions: had others been asked of these same models. How far another seed of the
training would fall from them is another matter, and no test over questions tells it.

Questions about one picture succeed and fail together, so what is drawn or flipped is always a picture's
whole sum (its cluster), never a single question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np

from mmtune.evaluation.metrics.base import clustered_stderr

NORMAL = NormalDist()
Z95 = NORMAL.inv_cdf(0.975)
POWER = NORMAL.inv_cdf(0.8)
SIX = 7.906  # the mean of a Poisson number that is six or more in 80 % of draws
DRAWS = 9_999  # with the observed one 10,000
RESAMPLES = 2_000
NOTHING = 1e-9  # a sum of scores below this is rounding
DEAREST = 3 * 10**8  # additions up to which the exact distribution is worked out


def paired(differences: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    """All that is to be said of one model's scores less another's, question by question; in points.

    difference; stderr (clustered, None for a single question) and ci95, its central-limit interval;
    ci95_bootstrap; p, two-sided, and the test that made it; detectable, the smallest difference that such a
    comparison shows (see there; above 100 where there are too few questions); n, and how many clusters.
    Where scores are 0 or 1 also p_mcnemar: McNemar's test takes the questions for independent, so it makes
    the headline only where no two of those that changed sides share a picture. There the two agree exactly.
    """
    values = np.asarray(differences, dtype=float)
    sums, sizes = _by_cluster(values, clusters)
    stderr = clustered_stderr(values.tolist(), clusters)
    difference, stderr = 100 * math.fsum(values) / len(values), None if stderr is None else 100 * stderr
    row: dict[str, Any] = {
        "difference": difference,
        "stderr": stderr,
        "ci95": None if stderr is None else [difference - Z95 * stderr, difference + Z95 * stderr],
        "ci95_bootstrap": bootstrap95(sums, sizes),
        "detectable": None
        if stderr is None
        else detectable(stderr, 100 * sums / len(values), 100 / len(values)),
        "n": len(values),
        "clusters": len(sums),
    }
    changed = values != 0
    if np.all(np.abs(values[changed]) == 1):
        row["p_mcnemar"] = mcnemar(int((values < 0).sum()), int((values > 0).sum()))
        of_changed = [cluster for cluster, moved in zip(clusters, changed, strict=True) if moved]
        if len(set(of_changed)) == len(of_changed):
            return row | {"p": row["p_mcnemar"], "test": "McNemar, exact"}
    return row | flip_signs(sums)


def flip_signs(sums: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """p by sign_flip and the name of the test."""
    p, exact = sign_flip(sums)
    how = "exact" if exact else f"{DRAWS + 1:,} draws"
    return {"p": p, "test": f"sign flips of pictures, {how}"}


def moves(differences: Sequence[float], clusters: Sequence[str]) -> np.ndarray:
    """The points by which each cluster moves the mean over all questions; they add up to the difference."""
    sums, _ = _by_cluster(np.asarray(differences, dtype=float), clusters)
    return 100 * sums / len(differences)


def mcnemar(lost: int, won: int) -> float:
    """The two-sided p of McNemar's exact test: were the questions that changed sides fair coins?

    lost, won: how many went from right to wrong and back. Twice the smaller tail of Binomial(lost + won,
    1/2), at most 1 (McNemar 1947; the exact form as in Fagerland et al., BMC Med Res Methodol 13:91, 2013).
    """
    n, ways, tail = lost + won, 1, 0
    for i in range(min(lost, won) + 1):
        tail += ways
        ways = ways * (n - i) // (i + 1)
    return float(min(Fraction(2 * tail, 2**n), Fraction(1)))


def sign_flip(sums: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, bool]:
    """The two-sided p of the paired permutation test over clusters, and whether it is exact.

    sums: each cluster's summed differences. Were the two models alike, each could as well have the other
    sign; p is the share of all 2^clusters signs under which the total is as far from zero as it is (Fisher's
    randomisation test). Exact for scores on a grid (0 or 1, tenths, their means over seeds), and for few
    clusters; otherwise drawn, with p = (k + 1) / (draws + 1) (Phipson and Smyth, 2010).
    """
    values = np.asarray(sums, dtype=float)
    total = abs(math.fsum(values))
    sizes = np.sort(np.abs(values[np.abs(values) > NOTHING]))  # the order they came in decides nothing
    if not len(sizes) or total <= NOTHING:
        return 1.0, True
    steps = _on_a_grid(sizes)
    if steps is not None:
        # The total is 2 * (sum of those with a plus) - (sum of all): far below is far above mirrored.
        most = (int(steps.sum()) - round(total / sizes[0] * int(steps[0]))) // 2
        if len(steps) * (most + 1) <= DEAREST:
            return min(1.0, 2 * _subset_tail(steps, most)), True
    if len(sizes) <= 16:
        signs = np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes)) & 1
        return float(np.mean(_as_far(signs, sizes, total))), True
    draw, beyond = np.random.default_rng(seed), 0
    for begin in range(0, DRAWS, 500):
        count = min(500, DRAWS - begin)
        bytes_ = draw.integers(0, 256, size=(count, -(-len(sizes) // 8)), dtype=np.uint8)
        beyond += int(_as_far(np.unpackbits(bytes_, axis=1)[:, : len(sizes)], sizes, total).sum())
    return (beyond + 1) / (DRAWS + 1), False


def bootstrap95(
    sums: Sequence[float] | np.ndarray, sizes: Sequence[int] | np.ndarray, seed: int = 0
) -> list[float] | None:
    """The 95 % percentile interval, in points, of the mean over questions when clusters are drawn anew.

    sums and sizes: each cluster's summed differences and its number of questions. None for one cluster.
    """
    if len(sums) < 2:
        return None
    turned = -1 if math.fsum(sums) < 0 else 1  # exchanging the models mirrors the interval exactly
    each = np.column_stack([np.round(turned * np.asarray(sums, dtype=float), 9), sizes])
    kinds, counts = np.unique(each, axis=0, return_counts=True)  # few, where scores are 0 or 1
    drawn = np.random.default_rng(seed).multinomial(len(each), counts / len(each), size=RESAMPLES)
    total = drawn @ kinds
    low, high = 100 * np.quantile(total[:, 0] / total[:, 1], [0.025, 0.975])
    return [float(low), float(high)] if turned > 0 else [-float(high), -float(low)]


def wilson95(scores: Sequence[float], clusters: Sequence[str]) -> list[float] | None:
    """The 95 % interval, in points, of the mean of scores in [0, 1]; never past 0 or 100, nor a point there.

    Wilson's (1927), with as many draws as give a proportion the clustered standard error of this mean (Korn
    and Graubard, 1998, for exact limits); where that error is 0, with one draw for each cluster. None for a
    single score.
    """
    stderr = clustered_stderr(scores, clusters)
    if stderr is None:
        return None
    mean = math.fsum(scores) / len(scores)
    variance = max(mean * (1 - mean), 0.0)
    draws = variance / stderr**2 if stderr > NOTHING and variance > NOTHING else len(set(clusters))
    shrunk = 1 + Z95**2 / draws
    centre = (mean + Z95**2 / (2 * draws)) / shrunk
    half = Z95 / shrunk * math.sqrt(variance / draws + (Z95 / (2 * draws)) ** 2)
    return [100 * max(0.0, centre - half), 100 * min(1.0, centre + half)]


def mean95(values: Sequence[float], intervals: Sequence[Sequence[float] | None]) -> list[float] | None:
    """The 95 % interval of the mean of independent values from their own, which need not be symmetric.

    What each lies above its lower end, or below its upper one, is added in squares (Zou and Donner, 2008).
    None where one of them has no interval.
    """
    known = [each for each in intervals if each is not None]
    if not known or len(known) < len(values):
        return None
    mean, n = math.fsum(values) / len(values), len(values)
    low, high = (
        math.hypot(*(value - each[end] for value, each in zip(values, known, strict=True))) / n
        for end in (0, 1)
    )
    return [mean - low, mean + high]


def normal_p(value: float, stderr: float | None) -> float | None:
    """The two-sided p of a value whose standard error is known, by the central limit; None without one."""
    if stderr is None:
        return None
    if stderr == 0:
        return 1.0 if value == 0 else 0.0
    return math.erfc(abs(value / stderr) / math.sqrt(2))


def detectable(stderr: float, moved: Sequence[float] | np.ndarray = (), least: float = 0.0) -> float:
    """The smallest true difference found in 80 % of such comparisons at two-sided 5 %, in points.

    (z.975 + z.8) SE, with as many answers changed as here. Where few are, the exact tests need more: six
    clusters that all moved one way, for five give p = 2 / 2^5. So it is no less than SIX mean moves. moved:
    what each cluster moves the mean by; least: what one question would, where none did.
    """
    changed = [abs(value) for value in moved if abs(value) > NOTHING]
    return max((Z95 + POWER) * stderr, SIX * (math.fsum(changed) / len(changed) if changed else least))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (1979): each p that says how sure one is among all of them.

    None stays None and is not counted.
    """
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    so_far = 0.0
    for rank, (p, i) in enumerate(known):
        so_far = max(so_far, min(1.0, (len(known) - rank) * p))
        adjusted[i] = so_far
    return adjusted


def _by_cluster(values: np.ndarray, clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The sum of each cluster's values, and how many there are."""
    _, of = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    return np.bincount(of, weights=values), np.bincount(of)


def _on_a_grid(sizes: np.ndarray) -> np.ndarray | None:
    """The sizes as whole multiples of one step; None where they have none that is not far smaller."""
    for scale in range(1, 61):
        steps = sizes / sizes[0] * scale
        whole = np.rint(steps)
        if np.all(np.abs(steps - whole) < 1e-7 * np.maximum(1, steps)):
            return whole.astype(np.int64)
    return None


def _subset_tail(steps: np.ndarray, most: int) -> float:
    """The probability that the steps a fair coin chooses add up to `most` or less."""
    chance = np.zeros(most + 1)
    chance[0] = 1.0
    for step in steps.tolist():
        if step <= most:
            chance[step:] += chance[:-step].copy()
        chance *= 0.5
    return float(chance.sum())


def _as_far(plus: np.ndarray, sizes: np.ndarray, total: float) -> np.ndarray:
    """Which rows of signs (1: plus, 0: minus) give a total as far from zero. Ties count, rounded or not."""
    totals = 2 * (plus.astype(float) @ sizes) - sizes.sum()
    return np.abs(totals) >= total - 1e-9 * sizes.sum()
