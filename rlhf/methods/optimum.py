"""How good could the best policy be? The closed-form optimum of the objective that PPO climbs.

For one prompt, with the reference pi_ref and beta = kl_coef, the objective

    J(pi) = E_pi[score] - beta * KL(pi || pi_ref)

is largest at pi* = pi_ref * exp(score / beta) / Z, where it is

    J* = beta * log Z,    Z = E_ref[exp(score / beta)]

(Ziegler et al. 2019 state pi*; Korbak et al. 2022 and Rafailov et al. 2023, appendix A.1, derive
it.) Z is a sum over all responses, and importance sampling estimates it: no policy is trained. In
theory samples of the reference are enough. In practice the responses that dominate Z are rare under
the reference, and a trained policy finds them. So the samples come from both, or from the reference
and several policies, if these are compared.

No training step uses this file. `python -m rlhf.tools.optimality` compares PPO with the optimum.
"""

import bisect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from pandas import DataFrame
from torch import Tensor
from torch.nn.functional import pad

from rlhf.evaluate import Response
from rlhf.masked import check_same_shape

LARGEST_N = 1_000_000  # of best-of-n; its KL is 12.8 nats

# ---- the optimum, from samples ----


class Optimum(NamedTuple):
    """The optimal policy's metrics for each prompt."""

    objective: Tensor  # (Q,)
    score: Tensor  # (Q,)
    kl_ref: Tensor  # (Q,) nats per response
    ess: Tensor  # (Q,) effective sample size
    weights: Tensor  # (Q, N) of the samples; those of a prompt sum to 1


def optimum(scores: Tensor, kl_coef: float, log_q: Tensor | None = None) -> Optimum:
    """The optimal policy's metrics for each prompt, by importance sampling.

    The N samples of a prompt come from the reference and from other policies; q is the mixture of
    them all, see log_mixture:

        u[i] = exp(scores[i] / beta) / (q[i] / pi_ref[i])
        w[i] = u[i] / sum over j of u[j]           pi* / q, self-normalised
        objective  J* = beta * log(mean of u)      the mean of u is unbiased for Z
        score         = sum of w * scores
        kl_ref        = sum of w * log(N w q / pi_ref) = (score - J*) / beta
        ess           = 1 / sum of w^2             effective sample size, from 1 to N (Kish 1965)

    The code has the logarithms of w, not u, and J* as score - beta * kl_ref, the same number.

    The estimate of J* is low on average, by about beta * (1/ess - 1/N) / 2 if ess is large, and by
    more if it is small: a policy then looks closer to the optimum than it is. `jackknife` removes
    most of it. With beta = 0, the optimum is the best sample.

    Args: scores (Q, N), N samples for each of Q prompts; kl_coef: 0 or more; log_q (Q, N): log q -
        log pi_ref of each sample (None: 0, all are the reference's).
    Returns: in float64.
    """
    scores, log_q = in_float64(scores, log_q)
    log_weights = torch.log_softmax(log_tilt(scores, kl_coef) - log_q, dim=1)  # (Q, N)
    weights = log_weights.exp()

    log_best = log_weights + math.log(scores.size(1)) + log_q  # (Q, N): log pi* / pi_ref
    score = (weights * scores).sum(dim=1)  # (Q,)
    kl_ref = torch.where(weights > 0, weights * log_best, 0.0).sum(dim=1)  # (Q,)
    objective = score - kl_coef * kl_ref  # (Q,)
    ess = 1 / (weights**2).sum(dim=1)  # (Q,)
    return Optimum(objective, score, kl_ref, ess, weights)


def in_float64(scores: Tensor, log_q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in float64, of one shape; log_q None becomes 0."""
    if log_q is None:
        log_q = torch.zeros_like(scores)
    check_same_shape(scores=scores, log_q=log_q)
    return scores.double(), log_q.double()


def log_mixture(log_ratios: Tensor) -> Tensor:
    """log q / pi_ref of each sample, where q is the mixture in equal parts of M policies.

        q / pi_ref = mean over the M policies of exp(log_ratios)

    Every sample is weighted by the mixture, whichever policy it came from (balance heuristic: Veach
    and Guibas 1995; Owen and Zhou 2000). So its weight is at most M times what it is with samples
    of any one of them only.

    Args: log_ratios (M, ...): log policy - log pi_ref, summed over the response. One of the M is
        pi_ref itself, with 0, and each has as many of the samples.
    """
    return torch.logsumexp(log_ratios, dim=0) - math.log(len(log_ratios))


def log_tilt(scores: Tensor, kl_coef: float) -> Tensor:
    """log pi* / pi_ref + log Z of each sample: scores (Q, N) -> (Q, N)."""
    if kl_coef == 0:
        is_best = scores == scores.amax(dim=1, keepdim=True)
        return torch.where(is_best, 0.0, -math.inf)
    return scores / kl_coef


# ---- best-of-n ----


def best_of_n(scores: Tensor, values: Tensor, n: int, log_q: Tensor | None = None) -> Tensor:
    """Expected value of the best by score of n samples of the reference.

    The N samples come from q, as in `optimum`, so that high scores are among them also if they are
    rare under the reference. With v = pi_ref / q, divided by its sum, the reference's distribution
    of scores is

        F(s) = sum of v over the samples with a score of at most s

    and the best of n is at most s with probability F(s)^n. So a sample of score s, v its share of
    the samples with that score, is the best with probability

        v / (F(s) - F(s-)) * (F(s)^n - F(s-)^n)        F(s-): of the scores below s

    Args: scores, values (Q, N): values may be the scores themselves, or another judge's scores of
        the same samples; n: 1 or more; log_q (Q, N): log q - log pi_ref of each sample, as in
        `optimum`.
    Returns: (Q,), in float64.
    """
    check_same_shape(scores=scores, values=values)
    scores, log_q = in_float64(scores, log_q)
    scores, order = scores.sort(dim=1)  # (Q, N), lowest first
    v = torch.softmax(-log_q, dim=1).gather(1, order)  # (Q, N)
    F = pad(v.cumsum(dim=1), (1, 0))  # (Q, N + 1): of the first 0, 1, ... N samples
    below = F.gather(1, torch.searchsorted(scores, scores))  # (Q, N): F(s-)
    up_to = F.gather(1, torch.searchsorted(scores, scores, right=True))  # (Q, N): F(s)
    share = torch.where(up_to > below, v / (up_to - below), 0.0)  # (Q, N); v may round to 0
    p = share * (up_to**n - below**n)  # (Q, N), sums to 1
    return (values.gather(1, order) * p).sum(dim=1)


def best_of_n_kl(n: float) -> float:
    """KL(best-of-n || reference) = log n - (n - 1) / n, in nats per response.

    Exact if no two samples tie, otherwise an upper bound (Stiennon et al. 2020, appendix G.3;
    Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def matching_n(kl: float) -> int:
    """The n, from 1 to LARGEST_N, whose best_of_n_kl is nearest to kl."""

    def middle(n: int) -> float:
        return (best_of_n_kl(n) + best_of_n_kl(n + 1)) / 2

    return 1 + bisect.bisect(range(1, LARGEST_N), kl, key=middle)  # how many lie below, plus one


# ---- metrics of policies, from the same samples ----

# Samples (4, M, Q, n) are n responses of each of M policies to each of Q prompts, in float64. The
# first policy is the reference. Rows: METRICS, and log q - log pi_ref, see log_mixture.
METRICS = ["score", "gold", "kl_ref"]  # also the rows of (3, Q); the gold of no judge is NaN
KL_REF = 2  # its number
COLUMNS = [*METRICS, "objective", "optimality", "optimality_se"]  # of evaluation.csv


def pooled(samples: Tensor) -> Tensor:
    """The samples of all policies together: (4, M, Q, n) -> (4, Q, M n)."""
    return samples.transpose(1, 2).flatten(2)


def policy_metrics(samples: Tensor, number: int) -> Tensor:
    """(3, Q) of policy `number`, from its own samples."""
    return samples[:3, number].mean(dim=2)


def best_of_n_metrics(samples: Tensor, n: int) -> Tensor:
    """(3, Q) of best-of-n, from all samples. Its KL is the same for every prompt."""
    scores, golds, _, log_q = pooled(samples)  # (Q, N) each
    score = best_of_n(scores, scores, n, log_q)  # (Q,)
    gold = best_of_n(scores, golds, n, log_q)  # (Q,)
    return torch.stack([score, gold, torch.full_like(score, best_of_n_kl(n))])


def optimal_metrics(samples: Tensor, kl_coef: float) -> Tensor:
    """(3, Q) of the optimum, from all samples."""
    scores, golds, _, log_q = pooled(samples)  # (Q, N) each
    best = optimum(scores, kl_coef, log_q)
    gold = (best.weights * golds).sum(dim=1)  # (Q,)
    return torch.stack([best.score, gold, best.kl_ref])


def jackknife(estimator: Callable[..., Tensor], samples: Tensor, setting: float) -> Tensor:
    """2 * (the estimate from all samples) - (the mean of those from each half).

    Half of the samples have about twice the bias of all of them, if that is proportional to 1/N, so
    the difference cancels it (Quenouille 1949).

    Args: estimator: one of the functions above; setting: its second argument.
    """
    halves = [estimator(samples[..., first::2], setting) for first in (0, 1)]
    return 2 * estimator(samples, setting) - sum(halves) / 2


# ---- metrics of policies, on all prompts ----


def response_metrics(responses: list[Response]) -> Tensor:
    """(3, P) of one response to each of P prompts, in float64."""
    return torch.tensor(DataFrame(responses)[METRICS].to_numpy(float)).T


def extend(metrics: Tensor, more: Tensor) -> Tensor:
    """The metrics on all P prompts of a policy that was measured on the first Q: another policy's,
    plus the mean difference to it.

    The first Q prompts also get their deviation from this mean, which changes no mean. It is
    scaled so that the standard error of a mean over P holds that of the mean over Q:

        std(x) / sqrt(Q) = std(scaled and padded with 0) / sqrt(P)

    Args: metrics (3, P): of the other policy; more (3, Q): the differences. Returns: (3, P).
    """
    P = metrics.size(1)
    Q = more.size(1)
    mean = more.mean(dim=1, keepdim=True)  # (3, 1)
    scale = math.sqrt(P * (P - 1) / (Q * max(1, Q - 1)))
    return metrics + mean + pad((more - mean) * scale, (0, P - Q))


def objective(metrics: Tensor, kl_coef: float) -> Tensor:
    """J = score - kl_coef * kl_ref: (3, P) -> (P,)."""
    score, _, kl_ref = metrics
    return score - kl_coef * kl_ref


def optimality(gain: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """gain / best, the share of the best policy's gain, and its standard error.

    To first order, errors e of the gain and E of the best policy's change the ratio R by (e - R E)
    / best. That is again a mean of a number per prompt, and its spread over the prompts gives the
    standard error. So the error contains the choice of prompts as well as the sampling of responses
    to them, and what two policies have in common on a prompt cancels. It does not contain the bias
    of J*.

    Args: gain, best: J - J_sft for each prompt, (P,).
    Returns: two scalars, NaN if the best policy gains nothing. From a single prompt, the error is
        NaN.
    """
    whole = best.mean()
    whole = torch.where(whole > 0, whole, math.nan)
    ratio = gain.mean() / whole
    errors = gain - ratio * best  # (P,)
    variance = errors.var(correction=0) / (len(errors) - 1)  # of the mean
    return ratio, variance.sqrt() / whole


# ---- rows of the tables ----


class Estimate(NamedTuple):
    """A policy beside best-of-n and the optimum."""

    rows: list[dict]  # of evaluation.csv: sft, the policy, best_of_n, optimum
    n: int  # of best_of_n
    ess: Tensor  # (Q,) effective sample size of the optimum


def estimate_optimum(
    evaluations: list[tuple[list[dict], list[Response], list[Response]]],
    samples: Tensor,
    kl_coef: float,
) -> list[Estimate]:
    """Each policy beside best-of-n with its KL, and beside the optimum, which is the same for all.

    best_of_n and optimum come from fewer prompts than the other rows, and prompts differ more than
    policies do. So their metrics, which are those of the `jackknife`, are paired with the first
    policy's: see `extend`. Every row gets its

        optimality = (J - J_sft) / (J* - J_sft),    J = score - kl_coef * kl_ref

    0 for the reference, 1 for the best policy that this objective has, and its standard error.

    Args: evaluations: of the K policies, a good one first, as evaluate.compare returns them;
        samples (4, 1 + K, Q, n): of the reference and of these policies, on the first Q of the P
        prompts.
    """
    _, before, after = evaluations[0]
    reference = response_metrics(before)  # (3, P)
    first = response_metrics(after)  # (3, P)
    paired = policy_metrics(samples, 1)  # (3, Q)
    best = extend(first, jackknife(optimal_metrics, samples, kl_coef) - paired)  # (3, P)
    scores, _, _, log_q = pooled(samples)  # (Q, N) each
    ess = optimum(scores, kl_coef, log_q).ess

    estimates = []
    for number, (rows, _, after) in enumerate(evaluations, start=1):
        n = matching_n(samples[KL_REF, number].mean().item())
        best_of = extend(first, jackknife(best_of_n_metrics, samples, n) - paired)  # (3, P)
        empty = dict.fromkeys(rows[0]) | {"prompts": paired.size(1)}
        table = [
            (rows[0], reference),
            (rows[1], response_metrics(after)),
            (empty | {"policy": "best_of_n"}, best_of),
            (empty | {"policy": "optimum"}, best),
        ]
        complete = [row | columns(x, reference, best, kl_coef) for row, x in table]
        estimates.append(Estimate(complete, n, ess))
    return estimates


def columns(
    metrics: Tensor, reference: Tensor, best: Tensor, kl_coef: float
) -> dict[str, float | None]:
    """COLUMNS of the policy with these metrics, beside the reference and the optimum: (3, P) each.

    None if a number is not known, such as the gold of no judge.
    """
    gain = objective(metrics - reference, kl_coef)  # (P,)
    best_gain = objective(best - reference, kl_coef)  # (P,)
    means = metrics.mean(dim=1)  # (3,)
    numbers = [*means, objective(means, kl_coef), *optimality(gain, best_gain)]
    values = torch.stack(numbers).tolist()
    return {name: None if math.isnan(x) else x for name, x in zip(COLUMNS, values)}
