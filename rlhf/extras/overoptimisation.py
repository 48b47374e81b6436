"""Gao, Schulman and Hilton's curves of over-optimisation (2022), fitted to the points of `python -m rlhf.tools.study`.

    gain in gold = d (a - b d) for best-of-n, d (a - b log d) for PPO,    d = sqrt(KL to the reference)
"""

import numpy
from pandas import DataFrame


def fit(d: numpy.ndarray, gain: numpy.ndarray, method: str) -> tuple[float, float]:
    """(a, b) of gain = d (a - b d) for best_of_n, gain = d (a - b log d) for ppo, by least squares. Gao et al. 2022."""
    columns = numpy.stack([d, -d * (d if method == "best_of_n" else numpy.log(d))], axis=1)
    a, b = numpy.linalg.lstsq(columns, gain, rcond=None)[0]
    return float(a), float(b)


def curves(points: DataFrame):
    """((method, seed, comparisons), points) of each curve: those without a KL penalty, with a column d = sqrt(KL)."""
    points = points[points["kl_coef"].fillna(0) == 0]
    return points.assign(d=points["kl_ref"].clip(lower=0) ** 0.5).groupby(["method", "seed", "comparisons"])


def fits(points: DataFrame) -> DataFrame:
    """One row for each curve. A curve starts with its first point, at d = 0; points whose d is not positive are not
    fitted, and a curve with fewer than three others has no row."""
    rows = []
    for (method, seed, size), curve in curves(points):
        rest, best, last = curve[curve["d"] > 0], curve.iloc[curve["gold"].argmax()], curve.iloc[-1]
        if len(rest) >= 3:
            a, b = fit(rest["d"].to_numpy(), (rest["gold"] - curve["gold"].iloc[0]).to_numpy(), method)
            rows.append({"method": method, "seed": seed, "comparisons": size, "alpha": a, "beta": b,
                         "highest_gold": best["gold"], "at_sqrt_kl": best["d"], "last_gold": last["gold"],
                         "last_score": last["score"], "last_sqrt_kl": last["d"]})
    return DataFrame(rows)


def spread(table: DataFrame) -> DataFrame:
    """Of the rows of fits, mean and standard deviation over the seeds for each method and size."""
    return table.drop(columns=["seed", "last_score", "last_sqrt_kl"]).groupby(["method", "comparisons"]).agg(
        ["mean", "std"])
