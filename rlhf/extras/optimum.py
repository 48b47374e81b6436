"""How good could the best policy be? The closed-form optimum of the objective that PPO climbs.

For one prompt, with the reference pi_ref and beta = kl_coef, the objective

    J(pi) = E_pi[score] - beta * KL(pi || pi_ref)

is largest at pi* = pi_ref * exp(score / beta) / Z, where it is

    J* = beta * log Z,    Z = E_ref[exp(score / beta)]

(Ziegler et al. 2019 state pi*; Korbak et al. 2022 and Rafailov et al. 2023, appendix A.1, derive it.) Z is a sum over
all responses, and importance sampling estimates it: no policy is trained. In theory samples of the reference are
enough. In practice the responses that dominate Z are rare under the reference, and a trained policy finds them. So the
samples come from both.

No training step uses this file. `python -m rlhf.tools.optimality` compares PPO with the optimum.
"""

import math
from pathlib import Path

import torch
from pandas import DataFrame, Series, read_csv
from torch import Tensor

from rlhf import evaluate
from rlhf.masked import check_same_shape

UNRELIABLE = 10  # effective sample size

def optimum(scores: Tensor, kl_coef: float, log_ratio: Tensor | None = None,
            reference_share: float = 1.0) -> dict[str, Tensor]:
    """The optimal policy's metrics for each prompt, by importance sampling from the reference and a second policy pi.

    Of the N samples of a prompt the share a comes from pi_ref and the rest from pi, so their density is the mixture q:

        q[i] / pi_ref[i] = a + (1 - a) * exp(log_ratio[i])
        u[i] = exp(scores[i] / beta) / (q[i] / pi_ref[i])
        w[i] = u[i] / sum over j of u[j]           pi* / q, self-normalised
        objective  J* = beta * log(mean of u)      the mean of u is unbiased for Z
        score         = sum of w * scores
        kl_ref        = sum of w * log(N w q / pi_ref) = (score - J*) / beta
        ess           = 1 / sum of w^2             effective sample size, between 1 and N (Kish 1965)

    Every sample is weighted by the mixture, whichever policy it came from (balance heuristic: Veach and Guibas 1995;
    Owen and Zhou 2000). So u is at most 1 / a times what it is with samples of pi_ref only, and at most 1 / (1 - a)
    times what it is with samples of pi only. If pi = pi_ref or a = 1, all samples are the reference's.

    The estimate of J* is low on average, by about beta * (1/ess - 1/N) / 2 if ess is large, and by more if it is small:
    a policy then looks closer to the optimum than it is. beta = 0 has the best sample as its optimum.

    Args: scores (Q, N), N samples for each of Q prompts; kl_coef: 0 or more; log_ratio (Q, N): log pi - log pi_ref of
        each sample, summed over its response (None: 0); reference_share: a, above 0.
    Returns: objective, score, kl_ref, ess, each (Q,), and weights (Q, N), in float64.
    """
    log_ratio = torch.zeros_like(scores) if log_ratio is None else log_ratio
    check_same_shape(scores=scores, log_ratio=log_ratio)
    if scores.dim() != 2 or scores.size(1) < 2:
        raise ValueError(f"scores must be (Q, N) with N at least 2, got {tuple(scores.shape)}")
    if not kl_coef >= 0 or not 0 < reference_share <= 1:
        raise ValueError(f"kl_coef, share are {kl_coef}, {reference_share}: not 0 or more, and above 0 and at most 1")
    scores, shares = scores.double(), torch.tensor([reference_share, 1 - reference_share], dtype=torch.float64)
    log_q = torch.logaddexp(shares[0].log(), shares[1].log() + log_ratio.double())  # (Q, N): log q / pi_ref
    if kl_coef == 0:
        log_tilt = torch.where(scores == scores.amax(dim=1, keepdim=True), 0.0, -math.inf)
    else:
        log_tilt = scores / kl_coef  # (Q, N): log pi* / pi_ref + log Z
    log_weights = torch.log_softmax(log_tilt - log_q, dim=1)
    weights = log_weights.exp()
    score = (weights * scores).sum(dim=1)  # (Q,)
    kl_ref = torch.where(weights > 0, weights * (log_weights + math.log(scores.size(1)) + log_q), 0.0).sum(dim=1)
    return {"objective": score - kl_coef * kl_ref, "score": score, "kl_ref": kl_ref,
            "ess": 1 / (weights**2).sum(dim=1), "weights": weights}


def best_of_n(scores: Tensor, values: Tensor, n: int) -> Tensor:
    """Expected value of the best by score of n samples, without replacement from the N at hand.

    Sorted by score, the sample at rank i (0 the lowest) is the best of a random n with probability C(i, n-1) / C(N, n).
    This uses all N samples, and is unbiased (Nakano et al. 2021, WebGPT, appendix I). Of equal scores the later wins.

    Args: scores, values (Q, N): values may be the scores themselves, or another judge's scores of the same samples.
    Returns: (Q,), in float64.
    """
    check_same_shape(scores=scores, values=values)
    if scores.dim() != 2 or not 1 <= n <= scores.size(1):
        raise ValueError(f"n = {n} must lie between 1 and N of scores (Q, N), here {tuple(scores.shape)}")
    N = scores.size(1)
    ranks = torch.arange(N, dtype=torch.float64, device=scores.device)
    # log C(i, n-1) - log C(N, n), -inf where i < n - 1
    log_p = (torch.lgamma(ranks + 1) - math.lgamma(n) - torch.lgamma((ranks - n + 2).clamp(min=1))
             - (math.lgamma(N + 1) - math.lgamma(n + 1) - math.lgamma(N - n + 1)))
    p = torch.where(ranks >= n - 1, log_p.exp(), 0.0)  # (N,), sums to 1
    order = scores.argsort(dim=1, stable=True)  # (Q, N), lowest first
    return (values.double().gather(1, order) * p).sum(dim=1)


def best_of_n_kl(n: float) -> float:
    """KL(best-of-n || reference) = log n - (n - 1) / n, in nats per response.

    Exact where no two samples tie, an upper bound otherwise (Stiennon et al. 2020, appendix G.3; Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def matching_n(kl: float, largest: int) -> int:
    """The n, from 1 to `largest`, whose best_of_n_kl is nearest to kl."""
    return min(range(1, largest + 1), key=lambda n: abs(best_of_n_kl(n) - kl))


# ---- of responses, as rlhf/evaluate.py has them ----


def column(responses: list[dict], name: str) -> Tensor:
    """One of their numbers as (1, N). NaN for the gold of no judge."""
    return torch.tensor([[math.nan if one[name] is None else one[name] for one in responses]], dtype=torch.float64)


def ppo_and_optimum(theirs: list[dict], ours: list[dict], kl_coef: float) -> dict:
    """PPO and the optimum on one prompt, from responses of the reference and of PPO to it: a row of optimality.csv.

    Args: theirs, ours: the kl_ref of a response is its log-probability under the policy that sampled it minus that
        under the other one.
    """
    said, ppo = theirs + ours, evaluate.summarise("ppo", ours, ours, kl_coef)
    log_ratio = torch.cat([-column(theirs, "kl_ref"), column(ours, "kl_ref")], dim=1)  # (1, N): log PPO - log reference
    best = optimum(column(said, "score"), kl_coef, log_ratio, len(theirs) / len(said))
    best["gold"] = (best["weights"] * column(said, "gold")).sum()
    names = ("score", "gold", "kl_ref", "objective")
    return {"prompt": said[0]["prompt"], "samples": len(said), "ess": best["ess"].item(),
            **{f"ppo_{name}": ppo[name] for name in names},
            **{name: None if ppo[name] is None else best[name].item() for name in names}}


def optimality_curve(metrics: DataFrame, evaluation: Path) -> Series | float:
    """Optimality over the steps of a run: (J - J_sft) / (J* - J_sft), where J is the mean objective of 15 steps.

    J is that of the prompts trained on; J_sft and J* are the held-out ones of evaluation.csv. NaN without a J* there.

    Args: metrics: ppo.csv; evaluation: the path of evaluation.csv.
    """
    J = read_csv(evaluation).set_index("policy")["objective"] if evaluation.is_file() else {}
    if "optimum" not in J:
        return math.nan
    return (metrics["objective"].rolling(15, center=True, min_periods=8).mean() - J["sft"]) / (J["optimum"] - J["sft"])


def optimality_error(gained: float, lacking: Tensor, bias: float) -> tuple[float, float]:
    """Standard error and bias of optimality = gained / (gained + L), with L the mean of lacking over the prompts.

    To first order, an error e in L changes it by -e * gained / (gained + L)^2. The standard error of L is that of a
    mean over Q prompts.

    Args: gained: PPO's J minus that of SFT; lacking (Q,): J* minus PPO's J on each prompt; bias: of L.
    Returns: both infinite if gained + L is not positive; the standard error also if Q is 1.
    """
    gain = gained + lacking.mean().item()
    if gain <= 0:
        return math.inf, math.inf
    slope = -gained / gain**2
    error = lacking.std().item() / math.sqrt(len(lacking)) if len(lacking) > 1 else math.inf
    return error * abs(slope), bias * slope


def add_optimum(table: list[dict], said: list[tuple[list[dict], list[dict]]], kl_coef: float) -> tuple[list[dict], str]:
    """Append the rows best_of_n and optimum to the table [sft, ..., ppo or dpo], and to every row its optimality

        (J - J_sft) / (J* - J_sft),    J = score - kl_coef * kl_ref

    0 for the reference, 1 for the best policy that this objective has. The two rows come from fewer prompts than the
    others, and prompts differ more than policies do, so they are paired with PPO's:

        number = PPO's mean over all prompts + (theirs - PPO's, means over the Q prompts that both have responded to)

    except for the KL of best-of-n, which is the same for every prompt.

    Args: said: for each of the Q prompts, the responses of the reference and of PPO, an even number of each.
    Returns: the rows of optimality.csv, and some lines on how far the estimate can be trusted: its standard error over
        the Q prompts, and its bias. Half of the samples give a lower J* than all of them. All of them give a J* that is
        too low by about the same amount, or by more if responses that are good and rare are still missing.
    """
    ppo, rows = table[-1], [ppo_and_optimum(theirs, ours, kl_coef) for theirs, ours in said]
    most = min(len(theirs) for theirs, _ in said)
    n, beyond = matching_n(ppo["kl_ref"], most), matching_n(ppo["kl_ref"], most + 1)
    best = [{name: best_of_n(column(theirs, "score"), column(theirs, name), n).item() for name in ("score", "gold")}
            for theirs, _ in said]

    def beside_ppo(name: str, theirs: list[dict]) -> float | None:
        ours = evaluate.mean(rows, f"ppo_{name}")
        return None if ours is None else ppo[name] + evaluate.mean(theirs, name) - ours

    for name, theirs, kl_ref in (("best_of_n", best, best_of_n_kl(n)), ("optimum", rows, beside_ppo("kl_ref", rows))):
        score = beside_ppo("score", theirs)
        table.append({**dict.fromkeys(ppo), "policy": name, "score": score, "gold": beside_ppo("gold", theirs),
                      "kl_ref": kl_ref, "objective": score - kl_coef * kl_ref, "prompts": len(said)})
    start, gain = table[0]["objective"], table[-1]["objective"] - table[0]["objective"]
    for row in table:
        row["optimality"] = (row["objective"] - start) / gain if gain > 0 else None
    halves = [ppo_and_optimum(theirs[k::2], ours[k::2], kl_coef) for k in (0, 1) for theirs, ours in said]
    bias, ess = evaluate.mean(halves, "objective") - evaluate.mean(rows, "objective"), evaluate.mean(rows, "ess")
    lacking = (column(rows, "objective") - column(rows, "ppo_objective")).squeeze(0)  # (Q,)
    error, bias = optimality_error(ppo["objective"] - start, lacking, bias)
    who = f"{ppo['policy'].upper()}'s"
    nearest = f"nearest to {who}" if beyond == n else f"below {who}: {most} samples allow no larger n"
    text = (f"best_of_n: n = {n}, whose KL is {nearest}\noptimum: {rows[0]['samples']} samples for each of {len(rows)} "
            f"prompts, half the reference's, half {who}; effective sample size {ess:.1f} on average\n"
            f"{who} optimality has a standard error of {error:.3f} from these prompts and is biased "
            f"{'downward' if bias < 0 else 'upward'} by at least {abs(bias):.3f}")
    if poor := [row["prompt"].strip().splitlines()[0][:40] for row in rows if row["ess"] < UNRELIABLE]:
        names = "; ".join(poor[:2] + ["..."] * (len(poor) > 2))
        text += f"\nunreliable (effective sample size below {UNRELIABLE}): {len(poor)} of {len(rows)} prompts: {names}"
    if not abs(bias) < 0.03 or ess < UNRELIABLE:
        text += "\nwarning: that is too few samples to trust; more --samples, or a larger --kl-coef"
    return rows, text
