"""How good could the best policy be? The closed-form optimum of the objective that PPO climbs.

For one prompt, with the reference pi_ref and beta = kl_coef, the objective

    J(pi) = E_pi[score] - beta * KL(pi || pi_ref)

is largest at pi* = pi_ref * exp(score / beta) / Z, where it is

    J* = beta * log Z,    Z = E_ref[exp(score / beta)]

(Ziegler et al. 2019 state pi*; Korbak et al. 2022 and Rafailov et al. 2023, appendix A.1, derive it.) Everything about
pi* is an expectation over the reference, so samples of the reference are enough to estimate it: no policy is trained.

No training step uses this file. `python -m rlhf.tools.optimality` compares PPO with it.
"""

import math

import torch
from torch import Tensor

from rlhf.masked import check_same_shape


def optimum(scores: Tensor, kl_coef: float) -> dict[str, Tensor]:
    """The optimal policy's figures for each prompt, from N samples of the reference, by importance weights.

        w[i] = exp(scores[i] / beta) / sum over j of exp(scores[j] / beta)         pi* / pi_ref, self-normalised
        objective  J* = beta * log(mean of exp(scores / beta))
        score         = sum of w * scores
        kl_ref        = sum of w * log(N w) = (score - J*) / beta                  at most log N
        ess           = 1 / sum of w^2             effective sample size, between 1 and N (Kish 1965)

    The estimate of J* is low on average, by about beta * (1/ess - 1/N) / 2 where ess is large, and by more where it is
    small: a policy then looks closer to the optimum than it is. beta = 0 has the best sample as its optimum.

    Args: scores (Q, N), N independent samples of the reference for each of Q prompts; kl_coef: 0 or more.
    Returns: objective, score, kl_ref, ess, each (Q,), and weights (Q, N), in float64.
    """
    if scores.dim() != 2 or scores.size(1) < 2:
        raise ValueError(f"scores must be (Q, N) with N at least 2, got {tuple(scores.shape)}")
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef is {kl_coef}: it must be 0 or more")
    scores, log_n = scores.double(), math.log(scores.size(1))
    if kl_coef == 0:
        best = (scores == scores.amax(dim=1, keepdim=True)).double()  # (Q, N)
        log_weights = torch.log(best / best.sum(dim=1, keepdim=True))
    else:
        log_weights = torch.log_softmax(scores / kl_coef, dim=1)  # (Q, N)
    weights = log_weights.exp()
    score = (weights * scores).sum(dim=1)  # (Q,)
    kl_ref = torch.where(weights > 0, weights * (log_weights + log_n), 0.0).sum(dim=1)
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
