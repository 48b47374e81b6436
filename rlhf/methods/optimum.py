"""How good could the best policy be? The closed-form optimum of the objective that PPO climbs.

For one prompt, with the reference pi_ref and beta = kl_coef, the objective

    J(pi) = E_pi[score] - beta * KL(pi || pi_ref)

is largest at pi* = pi_ref * exp(score / beta) / Z, where it is

    J* = beta * log Z,    Z = E_ref[exp(score / beta)]

(Ziegler et al. 2019 state pi*; Korbak et al. 2022 and Rafailov et al. 2023, appendix A.1, derive
it.) Z is a sum over all responses, and importance sampling estimates it: no policy is trained. In
theory samples of the reference are enough. In practice the responses that dominate Z are rare under
the reference, and a trained policy finds them. So the samples come from both.

No training step uses this file. `python -m rlhf.tools.optimality` compares PPO with the optimum.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from pandas import DataFrame, Series, read_csv
from torch import Tensor

from rlhf import evaluate
from rlhf.evaluate import Response
from rlhf.masked import check_same_shape

# ---- the optimum, from samples ----


class Optimum(NamedTuple):
    """The optimal policy's metrics for each prompt, in float64."""

    objective: Tensor  # (Q,)
    score: Tensor  # (Q,)
    kl_ref: Tensor  # (Q,) nats per response
    ess: Tensor  # (Q,) effective sample size
    weights: Tensor  # (Q, N) of the samples; those of a prompt sum to 1


def optimum(
    scores: Tensor, kl_coef: float, log_ratio: Tensor | None = None, reference_share: float = 1.0
) -> Optimum:
    """The optimal policy's metrics for each prompt, by importance sampling from the reference and a
    second policy pi.

    Of the N samples of a prompt the share a comes from pi_ref and the rest from pi, so their
    density is the mixture q:

        q[i] / pi_ref[i] = a + (1 - a) * exp(log_ratio[i])
        u[i] = exp(scores[i] / beta) / (q[i] / pi_ref[i])
        w[i] = u[i] / sum over j of u[j]           pi* / q, self-normalised
        objective  J* = beta * log(mean of u)      the mean of u is unbiased for Z
        score         = sum of w * scores
        kl_ref        = sum of w * log(N w q / pi_ref) = (score - J*) / beta
        ess           = 1 / sum of w^2             effective sample size, from 1 to N (Kish 1965)

    The code has the logarithms of w, not u, and J* as score - beta * kl_ref, the same number.

    Every sample is weighted by the mixture, whichever policy it came from (balance heuristic: Veach
    and Guibas 1995; Owen and Zhou 2000). So u is at most 1 / a times what it is with samples of
    pi_ref only, and at most 1 / (1 - a) times what it is with samples of pi only. If pi = pi_ref or
    a = 1, all samples are the reference's.

    The estimate of J* is low on average, by about beta * (1/ess - 1/N) / 2 if ess is large, and by
    more if it is small: a policy then looks closer to the optimum than it is. With beta = 0, the
    optimum is the best sample.

    Args: scores (Q, N), N samples for each of Q prompts; kl_coef: 0 or more; log_ratio (Q, N): log
        pi - log pi_ref of each sample, summed over its response (None: 0); reference_share: a,
        above 0.
    """
    if log_ratio is None:
        log_ratio = torch.zeros_like(scores)
    check_same_shape(scores=scores, log_ratio=log_ratio)
    if scores.dim() != 2 or scores.size(1) < 2:
        raise ValueError(f"scores must be (Q, N) with N at least 2, got {tuple(scores.shape)}")
    if not kl_coef >= 0 or not 0 < reference_share <= 1:
        raise ValueError(
            f"kl_coef, share are {kl_coef}, {reference_share}: not 0 or more, and above 0 and at "
            f"most 1"
        )
    scores = scores.double()
    log_q = log_mixture(log_ratio.double(), reference_share)  # (Q, N)
    log_weights = torch.log_softmax(log_tilt(scores, kl_coef) - log_q, dim=1)  # (Q, N)
    weights = log_weights.exp()

    log_best = log_weights + math.log(scores.size(1)) + log_q  # (Q, N): log pi* / pi_ref
    score = (weights * scores).sum(dim=1)  # (Q,)
    kl_ref = torch.where(weights > 0, weights * log_best, 0.0).sum(dim=1)  # (Q,)
    objective = score - kl_coef * kl_ref  # (Q,)
    ess = 1 / (weights**2).sum(dim=1)  # (Q,)
    return Optimum(objective, score, kl_ref, ess, weights)


def log_mixture(log_ratio: Tensor, reference_share: float) -> Tensor:
    """log q / pi_ref of each sample: log_ratio (Q, N) -> (Q, N)."""
    shares = torch.tensor([reference_share, 1 - reference_share], dtype=torch.float64)
    log_reference_share, log_policy_share = shares.log()
    return torch.logaddexp(log_reference_share, log_policy_share + log_ratio)


def log_tilt(scores: Tensor, kl_coef: float) -> Tensor:
    """log pi* / pi_ref + log Z of each sample: scores (Q, N) -> (Q, N)."""
    if kl_coef == 0:
        is_best = scores == scores.amax(dim=1, keepdim=True)
        return torch.where(is_best, 0.0, -math.inf)
    return scores / kl_coef


# ---- best-of-n ----


def best_of_n(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """Expected value of the best by score of n samples, without replacement from the N at hand.

    Sorted by score, the sample at rank i (0 the lowest) is the best of a random n with probability
    C(i, n-1) / C(N, n). This uses all N samples, and is unbiased (Nakano et al. 2021, WebGPT,
    appendix I). Of equal scores the later wins.

    Args: scores, values (Q, N): values may be the scores themselves, or another judge's scores of
        the same samples.
    Returns: (Q,), in float64.
    """
    check_same_shape(scores=scores, values=values)
    if scores.dim() != 2 or not 1 <= n <= scores.size(1):
        raise ValueError(
            f"n = {n} must lie between 1 and N of scores (Q, N), here {tuple(scores.shape)}"
        )
    N = scores.size(1)
    ranks = torch.arange(N, dtype=torch.float64, device=scores.device)  # (N,)
    possible = ranks >= n - 1  # (N,): below, fewer than n - 1 samples are worse
    left_out = (ranks - (n - 1)).clamp(min=0)  # (N,)
    log_below = torch.lgamma(ranks + 1) - math.lgamma(n) - torch.lgamma(left_out + 1)  # C(i, n-1)
    log_all = math.lgamma(N + 1) - math.lgamma(n + 1) - math.lgamma(N - n + 1)  # C(N, n)
    p = torch.where(possible, (log_below - log_all).exp(), 0.0)  # (N,), sums to 1
    order = scores.argsort(dim=1, stable=True)  # (Q, N), lowest first
    return (values.double().gather(1, order) * p).sum(dim=1)


def best_of_n_kl(n: float) -> float:
    """KL(best-of-n || reference) = log n - (n - 1) / n, in nats per response.

    Exact if no two samples tie, otherwise an upper bound (Stiennon et al. 2020, appendix G.3;
    Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def matching_n(kl: float, largest: int) -> int:
    """The n, from 1 to `largest`, whose best_of_n_kl is nearest to kl."""
    return min(range(1, largest + 1), key=lambda n: abs(best_of_n_kl(n) - kl))


# ---- one prompt, from the responses of rlhf/evaluate.py ----


class Metrics(NamedTuple):
    """What a policy reaches on a prompt, or on average over prompts."""

    score: float
    gold: float | None  # None without a judge
    kl_ref: float
    objective: float


class Samples(NamedTuple):
    """Responses to one prompt.

    The kl_ref of a response is its log-probability under the policy that sampled it minus that
    under the other one.
    """

    reference: list[Response]
    ppo: list[Response]

    def half(self, which: int) -> "Samples":
        """Every second response, from number `which` on: 0 or 1."""
        return Samples(self.reference[which::2], self.ppo[which::2])


@dataclass(frozen=True)
class PromptEstimate:
    """PPO and the optimum on one prompt."""

    prompt: str
    samples: int  # of both policies together
    ess: float  # effective sample size
    ppo: Metrics
    optimum: Metrics

    def row(self) -> dict:
        """A row of optimality.csv."""
        row = {"prompt": self.prompt, "samples": self.samples, "ess": self.ess}
        for name, value in self.ppo._asdict().items():
            row[f"ppo_{name}"] = value
        return {**row, **self.optimum._asdict()}


def column(responses: list[Response], name: str) -> Tensor:
    """A field of the responses as (1, N), in float64. NaN for the gold of no judge."""
    values = [getattr(response, name) for response in responses]
    numbers = [math.nan if value is None else value for value in values]
    return torch.tensor([numbers], dtype=torch.float64)


def ppo_and_optimum(samples: Samples, kl_coef: float) -> PromptEstimate:
    """PPO and the optimum on one prompt, from responses of the reference and of PPO to it."""
    responses = samples.reference + samples.ppo
    scores = column(responses, "score")  # (1, N)
    # kl_ref is log PPO - log reference for PPO's samples, and the other way round for the
    # reference's, see Samples.
    reference_ratio = -column(samples.reference, "kl_ref")
    ppo_ratio = column(samples.ppo, "kl_ref")
    log_ratio = torch.cat([reference_ratio, ppo_ratio], dim=1)  # (1, N): log PPO - log reference
    best = optimum(scores, kl_coef, log_ratio, len(samples.reference) / len(responses))

    measured = evaluate.summarise("ppo", samples.ppo, samples.ppo, kl_coef)
    ppo = Metrics(*[measured[name] for name in Metrics._fields])
    gold = None
    if ppo.gold is not None:
        gold = (best.weights * column(responses, "gold")).sum().item()
    optimal = Metrics(best.score.item(), gold, best.kl_ref.item(), best.objective.item())
    return PromptEstimate(responses[0].prompt, len(responses), best.ess.item(), ppo, optimal)


# ---- all prompts: best-of-n and the optimum beside PPO ----


@dataclass(frozen=True)
class Estimate:
    """best-of-n and the optimum beside PPO, and how far the estimate can be trusted.

    error and bias are of PPO's optimality: the standard error over the Q prompts, and what too few
    samples do. Half of the samples give a lower J* than all of them. All of them give a J* that is
    too low by about the same amount, or by more if responses that are good and rare are still
    missing.
    """

    prompts: list[PromptEstimate]
    n: int  # of best_of_n: the one with the KL nearest to PPO's that the samples allow
    larger_n_is_nearer: bool
    best_of_n: Metrics
    optimum: Metrics
    error: float
    bias: float

    @property
    def ess(self) -> float:
        """The mean effective sample size."""
        return evaluate.mean(self.prompts, "ess")


def estimate_optimum(table: list[dict], samples: list[Samples], kl_coef: float) -> Estimate:
    """best-of-n and the optimum beside PPO.

    They come from fewer prompts than the table's rows, and prompts differ more than policies do, so
    they are paired with PPO's: see beside_ppo.

    Args: table: rows of evaluation.csv, the first is sft and the last ppo or dpo; samples: for each
        of the Q prompts, an even number of responses of each policy.
    """
    sft = table[0]
    ppo = table[-1]
    prompts = [ppo_and_optimum(prompt, kl_coef) for prompt in samples]
    fewest = min(len(prompt.reference) for prompt in samples)
    n = matching_n(ppo["kl_ref"], fewest)

    gained = ppo["objective"] - sft["objective"]
    differences = [prompt.optimum.objective - prompt.ppo.objective for prompt in prompts]
    lacking = torch.tensor(differences, dtype=torch.float64)  # (Q,)
    objective_bias = bias_of_few_samples(samples, prompts, kl_coef)
    error, bias = optimality_error(gained, lacking, objective_bias)
    return Estimate(
        prompts=prompts,
        n=n,
        larger_n_is_nearer=matching_n(ppo["kl_ref"], fewest + 1) > n,
        best_of_n=best_of_n_beside_ppo(n, samples, ppo, prompts, kl_coef),
        optimum=optimum_beside_ppo(ppo, prompts, kl_coef),
        error=error,
        bias=bias,
    )


def beside_ppo(
    name: str, ppo: dict, prompts: list[PromptEstimate], numbers: list[float]
) -> float | None:
    """A metric of another policy over all prompts, from its numbers on the Q prompts.

        PPO's mean over all prompts + (mean of the numbers - PPO's mean), both over the Q prompts

    Args: ppo: the row of evaluation.csv.
    Returns: None for the gold of no judge.
    """
    ppo_mean = evaluate.mean([prompt.ppo for prompt in prompts], name)
    if ppo_mean is None:
        return None
    return ppo[name] + sum(numbers) / len(numbers) - ppo_mean


def best_of_n_beside_ppo(
    n: int, samples: list[Samples], ppo: dict, prompts: list[PromptEstimate], kl_coef: float
) -> Metrics:
    """best-of-n, see beside_ppo. Its KL is the same for every prompt, and is not paired."""
    paired = {}
    for name in ("score", "gold"):
        numbers = []
        for prompt in samples:
            scores = column(prompt.reference, "score")  # (1, N)
            values = column(prompt.reference, name)  # (1, N)
            numbers.append(best_of_n(scores, values, n).item())
        paired[name] = beside_ppo(name, ppo, prompts, numbers)
    kl_ref = best_of_n_kl(n)
    objective = paired["score"] - kl_coef * kl_ref
    return Metrics(paired["score"], paired["gold"], kl_ref, objective)


def optimum_beside_ppo(ppo: dict, prompts: list[PromptEstimate], kl_coef: float) -> Metrics:
    """The optimum, see beside_ppo."""
    paired = []
    for name in ("score", "gold", "kl_ref"):
        numbers = [getattr(prompt.optimum, name) for prompt in prompts]
        paired.append(beside_ppo(name, ppo, prompts, numbers))
    score, gold, kl_ref = paired
    return Metrics(score, gold, kl_ref, score - kl_coef * kl_ref)


def bias_of_few_samples(
    samples: list[Samples], prompts: list[PromptEstimate], kl_coef: float
) -> float:
    """The mean J* of half of the samples minus that of all of them."""
    halves = []
    for which in (0, 1):
        for prompt in samples:
            halves.append(ppo_and_optimum(prompt.half(which), kl_coef).optimum)
    whole = [prompt.optimum for prompt in prompts]
    return evaluate.mean(halves, "objective") - evaluate.mean(whole, "objective")


def optimality_error(gained: float, lacking: Tensor, bias: float) -> tuple[float, float]:
    """Standard error and bias of optimality = gained / (gained + L), with L the mean of lacking
    over the prompts.

    To first order, an error e in L changes it by -e * gained / (gained + L)^2. The standard error
    of L is that of a mean over Q prompts.

    Args: gained: PPO's J minus that of SFT; lacking (Q,): J* minus PPO's J on each prompt; bias: of
        L.
    Returns: both infinite if gained + L is not positive; the standard error also if Q is 1.
    """
    gain = gained + lacking.mean().item()
    if gain <= 0:
        return math.inf, math.inf
    slope = -gained / gain**2
    error = math.inf
    if len(lacking) > 1:
        error = lacking.std().item() / math.sqrt(len(lacking))
    return error * abs(slope), bias * slope


# ---- tables ----


def rows_with_optimum(table: list[dict], estimate: Estimate) -> list[dict]:
    """The rows of evaluation.csv with best_of_n and optimum below them, and in every row its

        optimality = (J - J_sft) / (J* - J_sft),    J = score - kl_coef * kl_ref

    0 for the reference, 1 for the best policy that this objective has. None if J* is not above
    J_sft.
    """
    rows = list(table)
    estimated = {"best_of_n": estimate.best_of_n, "optimum": estimate.optimum}
    for name, metrics in estimated.items():
        row = dict.fromkeys(table[0])  # the other columns stay empty
        row |= metrics._asdict()
        row |= {"policy": name, "prompts": len(estimate.prompts)}
        rows.append(row)
    start = table[0]["objective"]
    gain = estimate.optimum.objective - start
    with_optimality = []
    for row in rows:
        optimality = (row["objective"] - start) / gain if gain > 0 else None
        with_optimality.append({**row, "optimality": optimality})
    return with_optimality


def optimality_curve(metrics: DataFrame, evaluation: Path) -> Series | float:
    """Optimality over the steps of a run: (J - J_sft) / (J* - J_sft), where J is the mean objective
    of 15 steps.

    J is that of the prompts trained on; J_sft and J* are the held-out ones of evaluation.csv. NaN
    without a J* there.

    Args: metrics: ppo.csv; evaluation: the path of evaluation.csv.
    """
    if not evaluation.is_file():
        return math.nan
    J = read_csv(evaluation).set_index("policy")["objective"]
    if "optimum" not in J:
        return math.nan
    smoothed = metrics["objective"].rolling(15, center=True, min_periods=8).mean()
    return (smoothed - J["sft"]) / (J["optimum"] - J["sft"])
