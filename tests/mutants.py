"""A catalogue of known mistakes in RLHF code. This program makes each one and names the test that
catches it.

    python tests/mutants.py                      # all; Linux or macOS; not collected by pytest
    python tests/mutants.py rewards train_ppo    # only those of some suites
    python tests/mutants.py --table              # all, and write tests/mutants.md

A mutant replaces one piece of text of one file by another, in a copy of the repository. The tests of
its suite run until the first one fails. If none does, the mutant has survived: it is printed, and
the exit status is 1.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch  # noqa: F401  (so that no child has to import it)

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "mutants.md"
TIMEOUT = 300  # seconds; a mutant that hangs is caught
WIRING = "tests/scripts/test_wiring.py"
UPDATES = "tests/scripts/test_updates.py"
REWARDS = "tests/scripts/test_reward_functions.py"
DEVICE = ["tests/core/test_device.py", "-k", "host_seldom"]
LABEL = "tests/data/test_label.py"
PROCESSES = "tests/run/test_processes.py"
TOTAL = f"{PROCESSES}::test_total_sums_each_number_over_processes"
TWO_PROCESSES = f"{PROCESSES}::test_ppo_step_is_that_of_one_process_in_float64[2]"

# ---- suites: the file that is changed, and its tests ----
SUITES = {
    "masked": ("rlhf/masked.py", ["tests/core/test_masked.py"]),
    "losses": ("rlhf/losses.py", ["tests/core/test_losses.py"]),
    "rewards": ("rlhf/rewards.py", ["tests/core/test_rewards.py"]),
    "advantages": ("rlhf/advantages.py", ["tests/core/test_advantages.py", "-k", "not reaches"]),
    "sampling": ("rlhf/sampling.py", ["tests/core/test_sampling.py"]),
    "rollout": ("rlhf/rollout.py", ["tests/core/test_rollout.py", TWO_PROCESSES]),
    "ppo": ("rlhf/ppo.py", ["tests/core/test_ppo.py", TWO_PROCESSES]),
    "data": ("rlhf/data.py", ["tests/core/test_data.py", "-k", "not byte_for_byte"]),
    "gpt2": ("rlhf/networks/gpt2.py", ["tests/networks/test_gpt2.py"]),
    "export": (
        "rlhf/networks/export.py",
        ["tests/tools/test_export.py", "tests/networks/test_export.py"],
    ),
    "export_tokenizer": (
        "rlhf/networks/export_tokenizer.py",
        ["tests/tools/test_export.py", "tests/networks/test_export.py"],
    ),
    "tools_export": (
        "rlhf/tools/export.py",
        ["tests/tools/test_export.py", "tests/networks/test_export.py"],
    ),
    "lora": ("rlhf/networks/lora.py", ["tests/networks/test_lora.py"]),
    "loading": ("rlhf/run/loading.py", ["tests/networks/test_lora.py"]),
    "hf": ("rlhf/networks/hf.py", ["tests/networks/test_hf.py"]),
    "hf_reward": ("rlhf/networks/hf_reward.py", ["tests/networks/test_hf_reward.py"]),
    "hf_tokenizer": (
        "rlhf/networks/hf_tokenizer.py",
        [
            "tests/networks/test_chat.py",
            "tests/networks/test_hf.py",
            "tests/networks/test_hf_reward.py",
        ],
    ),
    "optimum": ("rlhf/methods/optimum.py", ["tests/methods/test_optimum.py"]),
    "heldout": (
        "rlhf/run/heldout.py",
        ["tests/run/test_heldout.py", f"{LABEL}::test_load_comparisons_drops_ties_and_skips"],
    ),
    "messages": ("rlhf/run/messages.py", ["tests/run/test_messages.py"]),
    "reward_functions": ("rlhf/run/reward_functions.py", ["tests/run/test_reward_functions.py"]),
    "user_code": ("rlhf/run/user_code.py", ["tests/run/test_reward_functions.py"]),
    "warnings": ("rlhf/run/warnings.py", ["tests/run/test_warnings.py"]),
    "sample": ("rlhf/tools/sample.py", ["tests/tools/test_sample.py"]),
    "responses": ("data/responses.py", ["tests/tools/test_sample.py"]),
    "optimality": ("rlhf/tools/optimality.py", [REWARDS, "tests/tools/test_optimality.py"]),
    "report": ("rlhf/tools/report.py", ["tests/tools/test_report.py", "-k", "not browser"]),
    "token_rows": ("rlhf/run/progress.py", ["tests/run/test_progress.py"]),
    "formats": ("data/formats.py", ["tests/data/test_formats.py"]),
    "tables": ("data/tables.py", ["tests/tools/test_prepare.py", "-k", "not usual and not real"]),
    "label_votes": ("data/label_votes.py", ["tests/data/test_label_votes.py"]),
    "label_pairs": ("data/label_pairs.py", [LABEL]),
    "label_terminal": ("data/label_terminal.py", ["tests/data/test_label_terminal.py"]),
    "label_web": ("data/label_web.py", ["tests/data/test_label_web.py", "-k", "not browser"]),
    "label_reward": ("data/label_reward.py", [LABEL]),
    "dpo": ("rlhf/methods/dpo.py", ["tests/methods/test_dpo.py"]),
    "checkpoints": (
        "rlhf/run/checkpoints.py",
        ["tests/run/test_checkpoints.py", "tests/run/test_training.py"],
    ),
    "training": ("rlhf/run/training.py", ["tests/run/test_training.py"]),
    "optimizer": ("rlhf/run/optimizer.py", ["tests/run/test_optimizer.py", TWO_PROCESSES]),
    "checks": ("rlhf/run/checks.py", ["tests/run/test_checks.py"]),
    "processes": ("rlhf/run/processes.py", [TOTAL, TWO_PROCESSES]),
    "metrics": ("rlhf/run/metrics.py", ["tests/run/test_metrics.py"]),
    "micro_batches": ("rlhf/run/micro_batches.py", ["tests/run/test_micro_batches.py"]),
    "train_sft": ("train_sft.py", [WIRING, UPDATES]),
    "train_reward": ("train_reward.py", [WIRING, UPDATES]),
    "train_ppo": (
        "train_ppo.py",
        [WIRING, REWARDS, "tests/scripts/test_advantage.py", "-k", "not tools_read"],
    ),
    "device_sampling": ("rlhf/sampling.py", DEVICE),
    "device_rollout": ("rlhf/rollout.py", DEVICE),
    "device_ppo": ("rlhf/ppo.py", DEVICE),
    "device_train_ppo": ("train_ppo.py", DEVICE),
    "credit": (
        "rlhf/ppo.py",
        [WIRING, REWARDS, "tests/scripts/test_advantage.py", "-k", "not tools_read"],
    ),
}
# Suites whose tests are skipped without this package.
OPTIONAL = {
    "hf": "transformers",
    "export": "peft",
    "export_tokenizer": "transformers",
    "tools_export": "transformers",
}

# ---- mutants: suite, mistake, text, what it becomes ----
MUTANTS = [
    ("masked", "whiten keeps the mean", "return x - masked_mean(x, mask)", "return x"),
    ("masked", "whiten divides rounding by its own deviation", "    x = x - torch.where(mask, x, torch.inf).amin()\n", ""),
    ("masked", "lowest entry over pads", "torch.where(mask, x, torch.inf).amin()", "x.amin()"),
    ("masked", "whiten variance over pads", "var = masked_mean(x**2, mask)", "var = (x**2).mean()"),
    ("masked", "sums in half precision", "return x.to(torch.promote_types(x.dtype, torch.float32))", "return x"),
    ("masked", "mean ignores the mask", "zero_outside(x, mask).sum() / mask.sum()", "x.mean()"),
    ("masked", "pads multiplied by the mask", "return torch.where(mask, at_least_float32(x), 0.0)", "return at_least_float32(x) * mask"),
    ("masked", "log-probability without the shift", "tokens[rows, slots + 1].long()", "tokens[rows, slots].long()"),
    ("masked", "logits shifted the other way", "return x[rows, slots]", "return x[rows, slots + 1]"),
    ("masked", "log-probabilities of another slot", "logprobs.gather(1, actions", "logprobs.roll(-1, dims=0).gather(1, actions"),
    ("losses", "advantage sign", "unclipped = -advantages * ratio", "unclipped = advantages * ratio"),
    ("losses", "ratio inverted", "new_logprobs - old_logprobs, mask", "old_logprobs - new_logprobs, mask"),
    ("losses", "value loss without a half", "0.5 * masked_mean", "masked_mean"),
    ("losses", "value clip takes the smaller", "0.5 * masked_mean(torch.maximum", "0.5 * masked_mean(torch.minimum"),
    ("losses", "value clip fraction counts a V at the edge", ".abs() > clip_eps", ".abs() >= clip_eps"),
    ("losses", "value clip fraction counts equal branches", "(beyond & (clipped > unclipped))", "(beyond & (clipped >= unclipped))"),
    ("losses", "value clip centred on the returns", "clipped_values = old_values + (new_values - old_values)", "clipped_values = returns + (new_values - returns)"),
    ("losses", "Bradley-Terry reversed", "-F.logsigmoid(margins).mean()", "-F.logsigmoid(-margins).mean()"),
    ("losses", "log of sigmoid", "-F.logsigmoid(margins).mean()", "-torch.log(torch.sigmoid(margins)).mean()"),
    ("losses", "PPO min and max swapped", "    loss = masked_mean(torch.maximum(", "    loss = masked_mean(torch.minimum("),
    ("losses", "ratio that overflows", "torch.where(advantages >= 0, limited, log_ratio)", "log_ratio"),
    ("losses", "ratio limited where it is never clipped", "torch.where(advantages >= 0, limited, log_ratio)", "limited"),
    ("losses", "ratio limited below the clip", "log_ratio.clamp(max=1 + clip_eps)", "log_ratio.clamp(max=clip_eps / 2)"),
    ("losses", "0 * -inf in the entropy", "(logprobs.exp() * finite)", "(logprobs.exp() * logprobs)"),
    ("losses", "clip fraction as |r - 1| > eps", "return loss, masked_mean((clipped > unclipped).float(), mask)", "return loss, masked_mean(((ratio - 1).abs() > clip_eps).float(), mask)"),
    ("rewards", "KL sign flipped", "-kl_coef * kl_k1", "kl_coef * kl_k1"),
    ("rewards", "KL not masked", "torch.where(mask, -kl_coef * kl_k1(logprobs, ref_logprobs), 0.0)", "-kl_coef * kl_k1(logprobs, ref_logprobs)"),
    ("rewards", "score in the last column", ".amax(dim=1, keepdim=True)", ".amax(dim=1, keepdim=True) * 0 + mask.size(1) - 1"),
    ("rewards", "k3 of the wrong side", "torch.expm1(-d) + d", "torch.expm1(d) - d"),
    ("rewards", "k3 without expm1", "torch.expm1(-d) + d", "torch.exp(-d) - 1 + d"),
    ("advantages", "GAE without lambda", "gamma * lam * next_advantage", "gamma * next_advantage"),
    ("advantages", "GAE without gamma on V", "gamma * next_value", "next_value"),
    ("advantages", "GAE reads V from pads", "values = torch.where(mask, values, 0.0)", "values = values * 1"),
    ("advantages", "GAE advantages not masked", "torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)", "delta + gamma * lam * next_advantage"),
    ("advantages", "returns are advantages", "return advantages, advantages + values", "return advantages, advantages"),
    ("advantages", "groups of every G-th row", "(scores).view(-1, group_size)", "(scores).view(group_size, -1).t()"),
    ("advantages", "GRPO divides rounding by its own deviation", "    groups = groups - groups.amin(dim=1, keepdim=True)\n", ""),
    ("advantages", "variance of equal returns is rounding", "centred(returns, mask) ** 2", "(returns - masked_mean(returns, mask)) ** 2"),
    ("advantages", "RLOO's mean holds the response itself", " * (group_size / (group_size - 1))", ""),
    ("advantages", "GRPO never divides", "    if divide:", "    if False:"),
    ("advantages", "GRPO always divides", "    if divide:", "    if True:"),
    ("advantages", "GRPO divides by the variance", "torch.rsqrt(var + 1e-8)", "1 / (var + 1e-8)"),
    ("advantages", "GRPO's deviation over the whole batch", "(groups**2).mean(dim=1, keepdim=True)", "(groups**2).mean()"),
    ("advantages", "REINFORCE compares within groups", "rloo_advantages(R, len(R))", "rloo_advantages(R, group_size)"),
    ("advantages", "advantages of whole responses not masked", "torch.where(mask, advantages.unsqueeze(1), 0.0)", "advantages.unsqueeze(1).expand(mask.shape)"),
    ("advantages", "returns of whole responses are advantages", "torch.zeros_like(rewards)", "torch.where(mask, advantages.unsqueeze(1), 0.0)"),
    ("sampling", "pads between prompt and response are read", "readable = state.readable[:, None, None, : P + t + 1]", "readable = None"),
    ("sampling", "positions count the pads", "state.cache, positions, readable)", "state.cache, None, readable)"),
    ("sampling", "one random number for all rows", "self.uniforms[rows, t]", "self.uniforms[rows[:1], t].expand(len(rows))"),
    ("sampling", "cache keeps the rows that have ended", "self.cache.keep(kept)", "self.cache.keep(torch.arange(len(kept)))"),
    ("sampling", "end-of-text is not part of the response", "self.lengths[rows] += going", "self.lengths[rows] += going & ~torch.isin(sampled, self.stops)"),
    ("sampling", "a row's own limit does not end it", " | (self.lengths[rows] == self.longest[rows])", ""),
    ("sampling", "limits are one token too long", "        prompt_lens + limits,\n", "        prompt_lens + limits + (limits < N),\n"),
    ("sampling", "limits count the prompt", "        prompt_lens + limits,\n", "        torch.maximum(limits, prompt_lens + 1),\n"),
    ("sampling", "a row's own limit does not end it without a cache", "        _, going = batch.append(rows, going, logits[every, last], t)\n", "        sampled, _ = batch.append(rows, going, logits[every, last], t)\n        going = going & ~torch.isin(sampled, batch.stops)\n"),
    ("sampling", "a row's own limit does not end it with a cache", "newest, state.going = batch.append(state.rows, state.going, logits, t)", "newest, _ = batch.append(state.rows, state.going, logits, t)\n        state.going &= ~torch.isin(newest, batch.stops)"),
    ("rollout", "the reference responds", "            policy.gpt,\n", "            frozen.reference,\n"),
    ("rollout", "reference scored by the policy", "ref_hidden = frozen.reference.hidden(tokens)", "ref_hidden = hidden"),
    ("rollout", "rollout not gathered from the processes", "Rollout(*map(processes.gather, collect_rows(policy, frozen, *mine)))", "collect_rows(policy, frozen, *mine)"),
    ("rollout", "random numbers belong to processes", "mine = [processes.share(x) for x in (prompts, prompt_lens, uniforms, prompt_list)]", "mine = [processes.share(prompts), processes.share(prompt_lens), uniforms[: len(processes.share(prompts))], processes.share(prompt_list)]"),
    ("rollout", "functions get the prompts of the first rows under torchrun", "mine = [processes.share(x) for x in (prompts, prompt_lens, uniforms, prompt_list)]", "mine = [processes.share(x) for x in (prompts, prompt_lens, uniforms)]\n    mine.append(prompt_list[: len(mine[0])])"),
    ("rollout", "functions get the prompts of other rows", "[prompt.given for prompt in prompt_list]", "[prompt.given for prompt in prompt_list[1:] + prompt_list[:1]]"),
    ("rollout", "functions get messages as text", "prompt.given for prompt", "prompt.text for prompt"),
    ("rollout", "responses hold end-of-text", "[i for i in ids if i not in tokenizer.stop_ids]", "ids"),
    ("rollout", "weights of the rewards ignored", "(parts * parts.new_tensor(frozen.weights)).sum(dim=1)", "parts.sum(dim=1)"),
    ("rollout", "each reward gets the weight of another", "parts.new_tensor(frozen.weights)", "parts.new_tensor(frozen.weights).roll(1)"),
    ("rollout", "only functions are weighted", "parts.new_tensor(frozen.weights)", "parts.new_tensor((1.0, *frozen.weights[1:]))"),
    ("rollout", "--missing-eos-score for all responses", "torch.where(ended, scores, frozen.missing_eos_score)", "torch.full_like(scores, frozen.missing_eos_score)"),
    ("rollout", "--missing-eos-score is added", "torch.where(ended, scores, frozen.missing_eos_score)", "torch.where(ended, scores, scores + frozen.missing_eos_score)"),
    ("rollout", "--missing-eos-score replaces the reward model's part only", "torch.where(ended, scores, frozen.missing_eos_score)", "torch.where(ended, scores, frozen.missing_eos_score + scores - frozen.weights[0] * parts[:, 0])"),
    ("rollout", "without --missing-eos-score the default", "        return scores\n", "        frozen = frozen._replace(missing_eos_score=-3.0)\n"),
    ("rollout", "longest response never drawn", "limits = 1 + self.max_new_tokens - self.shortest_limit", "limits = self.max_new_tokens - self.shortest_limit"),
    ("rollout", "limits from one token", "return self.shortest_limit + (uniforms[:, -1] * limits).long()", "return 1 + (uniforms[:, -1] * self.max_new_tokens).long()"),
    ("rollout", "limits drawn with the number of the first token", "uniforms[:, -1] * limits", "uniforms[:, 0] * limits"),
    ("rollout", "limits drawn with the number of the last token", "columns = frozen.max_new_tokens + frozen.draws_limits", "columns = frozen.max_new_tokens"),
    ("ppo", "entropy sign", "- cfg.entropy_coef * entropy", "+ cfg.entropy_coef * entropy"),
    ("ppo", "value loss without its weight", "cfg.value_coef * v_loss", "v_loss"),
    ("ppo", "value loss left out", "pg_loss + cfg.value_coef * v_loss", "pg_loss"),
    ("ppo", "ratio not clipped", "mask, cfg.clip_eps", "mask, 1e9"),
    ("ppo", "--value-clip-eps ignored", "cfg.value_clip_eps or math.inf", "math.inf"),
    ("ppo", "kl_old the wrong way round", "kl_k3(minibatch.old_logprobs, new_logprobs)", "kl_k3(new_logprobs, minibatch.old_logprobs)"),
    ("ppo", "the same order in each inner epoch", '"update", step, epoch)', '"update", step)'),
    ("ppo", "the same order in each step", '"update", step, epoch)', '"update", epoch)'),
    ("ppo", "metrics weighted by one instead of the weight", "history.add(weight, metrics)", "history.add(1.0, metrics)"),
    ("ppo", "micro-batches not weighted", "scale(weight * loss)", "scale(loss)"),
    ("ppo", "gradient not cleared between minibatches", "            optimizer.zero_grad()\n", ""),
    ("ppo", "each minibatch divides by its own actions", "D = experience.mask.sum().double() * len(rows) / len(experience.mask)", "D = experience.mask[rows].sum().double()"),
    ("ppo", "mean of the processes' own means", "    D = experience.mask.sum().double() * len(rows) / len(experience.mask)", "    from rlhf.run.processes import WORLD, share\n    of_all = experience.mask[rows].sum()\n    D = experience.mask.sum().double() * len(rows) / len(experience.mask) * WORLD * experience.mask[share(rows)].sum() / of_all"),
    ("data", "swapped prompts are not", "row._replace(prompt=prompt)", "row"),
    ("train_sft", "validated on the training rows", "gpt.config.block_size, heldout=True)", "gpt.config.block_size)"),
    ("train_sft", "micro-batches not weighted", "part_loss = weighted_loss(gpt, part, rows,", "part_loss = weighted_loss(gpt, part, part,"),
    ("train_sft", "rate not scheduled", "cfg.lr * cosine_schedule(step, cfg.steps, cfg.warmup)", "cfg.lr"),
    ("train_sft", "--heldout ignored", "tokenizer, limit, heldout, cfg.heldout)", "tokenizer, limit, heldout)"),
    ("train_reward", "accuracy reversed", "return share_positive(margins)", "return share_positive(-margins)"),
    ("train_reward", "margins in units of the score", "raw = model.scale.cpu() * margins", "raw = margins"),
    ("train_reward", "not started from the fine-tuned model", "loading.with_adapters(gpt,", "loading.with_adapters(type(gpt)(gpt.config),"),
    ("train_reward", "evaluated on the training rows", "limit, True, cfg.heldout, files)", "limit, False, cfg.heldout, files)"),
    ("train_reward", "micro-batches not weighted", "part_loss * (len(part) / len(rows))", "part_loss * 1"),
    ("train_reward", "--heldout ignored by the training comparisons", "limit, False, cfg.heldout, files)", "limit, False, files=files)"),
    ("train_ppo", "groups are not consecutive", "[prompt for prompt in chosen for _ in range(cfg.group_size)]", "[prompt for _ in range(cfg.group_size) for prompt in chosen]"),
    ("train_ppo", "as many prompts as responses", "cfg.batch_size // cfg.group_size", "cfg.batch_size"),
    ("train_ppo", "a value network with every advantage", '    if cfg.advantage != "gae":\n        return PolicyWithoutValue(gpt)', "    if False:\n        return PolicyWithoutValue(gpt)"),
    ("credit", "always RLOO", "response_advantages(rewards, mask, cfg.advantage, cfg.group_size)", 'response_advantages(rewards, mask, "rloo", cfg.group_size)'),
    ("credit", "advantages from the score only", "response_advantages(rewards,", "response_advantages(rewards + cfg.kl_coef * (rollout.logprobs - rollout.ref_logprobs),"),
    ("credit", "gamma and lambda swapped", "mask, cfg.gamma, cfg.lam)", "mask, cfg.lam, cfg.gamma)"),
    ("train_ppo", "KL rewarded", "rollout.ref_logprobs, rollout.mask, kl_coef\n", "rollout.ref_logprobs, rollout.mask, -kl_coef\n"),
    ("train_ppo", "score negated", "            rollout.scores, rollout.logprobs,", "            -rollout.scores, rollout.logprobs,"),
    ("credit", "advantages negated", "advantages = masked_whiten(", "advantages = -masked_whiten("),
    ("credit", "advantages not whitened", "advantages = masked_whiten(advantages, mask)", "pass"),
    ("train_ppo", "kl_coef not adapted", "kl_coef = adapt_kl_coef(", "adapt_kl_coef("),
    ("train_ppo", "rate not scheduled", "cfg.lr * linear_schedule(step, cfg.steps, cfg.warmup)", "cfg.lr"),
    ("train_ppo", "policy decays", "weight_decay=0.0, eps=1e-5", "weight_decay=0.1, eps=1e-5"),
    ("train_ppo", "--missing-eos-score ignored", "missing_eos_score=cfg.missing_eos_score,", "missing_eos_score=-3.0,"),
    ("train_ppo", "--temperature ignored", "gpt.temperature = cfg.temperature", "pass"),
    ("train_ppo", "first ratio not looked at", "        check_first_step(policy,", "        (lambda *a: 0)(policy,"),
    ("train_ppo", "reference is the policy", "reference = loading.frozen_copy(gpt)", "reference = gpt"),
    ("train_ppo", "value network is the reward model", "    reward_model.gpt = loading.frozen_copy(value_gpt)\n", "    reward_model.gpt = value_gpt\n"),
    ("train_ppo", "the reward model's network is trained", "    return PolicyWithValue(gpt, value_gpt)", "    reward_model.gpt, value_gpt = value_gpt, reward_model.gpt\n    return PolicyWithValue(gpt, value_gpt)"),
    ("train_ppo", "--heldout ignored by the training prompts", "limit, share=cfg.heldout)", "limit)"),
    ("train_ppo", "--heldout ignored by the evaluation", "frozen.tokenizer, limit, True, cfg.heldout)", "frozen.tokenizer, limit, True)"),
    ("train_ppo", "evaluated on training prompts", "frozen.tokenizer, limit, True, cfg.heldout)", "frozen.tokenizer, limit, False, cfg.heldout)"),
    ("train_ppo", "value network without a reward model is frozen", "loading.trained_copy(gpt))", "loading.frozen_copy(gpt))"),
    ("train_ppo", "value network without a reward model is the policy", "loading.trained_copy(gpt))", "gpt)"),
    ("train_ppo", "--reward-weights ignored", "weights=rewards.weights", "weights=(1.0,)"),
    ("train_ppo", "shortest limit ignored", "shortest_limit=cfg.max_new_tokens[0]", "shortest_limit=0"),
    ("lora", "scale without the rank", "torch.tensor(alpha / rank)", "torch.tensor(alpha)"),
    ("lora", "the adapter's part is rounded before the sum", "(frozen + F.linear(narrow, self.B)).to(frozen.dtype)", "frozen + F.linear(narrow, self.B).to(frozen.dtype)"),
    ("lora", "adapters compute in bfloat16", "F.linear(x.to(self.A.dtype), self.A)", "F.linear(x, self.A.to(x.dtype)).float()"),
    ("lora", "B does not start at zero", "torch.zeros(linear.out_features, rank)", "torch.ones(linear.out_features, rank)"),
    ("lora", "frozen network is trained too", "    gpt.requires_grad_(False)\n", ""),
    ("loading", "reference shares the adapters", "shared = {id(p): p for p in gpt.parameters() if not p.requires_grad}", "shared = {id(p): p for p in gpt.parameters()}"),
    ("loading", "reference copies the weights under the adapters", "shared = {id(p): p for p in gpt.parameters() if not p.requires_grad}", "shared = {}"),
    ("hf_tokenizer", "begin-of-text is forgotten", "self.renumbered(self.begin + self.text_ids(text))", "self.renumbered(self.text_ids(text))"),
    ("hf_tokenizer", "begin-of-text of a model that expects none", "[old for old in empty[:1] if old in starts]", "[self.original.bos_token_id] * (self.original.bos_token_id is not None)"),
    ("hf_tokenizer", "SentencePiece's space before a response", "self.text_ids(NO_CHARACTER + text)[len(self.text_ids(NO_CHARACTER)) :]", "self.text_ids(text)"),
    ("hf_tokenizer", "two spaces before a response", 'as_text(prompt).rstrip(" ")', "as_text(prompt)"),
    ("hf_tokenizer", "special tokens of a user are control tokens", ", sanitize_control_tokens=True", ""),
    ("hf_tokenizer", "the end of a turn is end-of-text", "ends = [self.end_of_turn(), ", "ends = ["),
    ("hf_tokenizer", "only one token ends a response", "self.stop_ids = tuple(stops)", "self.stop_ids = tuple(stops[:1])"),
    ("hf_tokenizer", "--system ignored", 'if self.system and messages[0]["role"] != "system":', "if False:"),
    ("hf", "pads between prompt and response are read", "attention_mask=mask", "attention_mask=None"),
    ("hf", "the sliding window counts pads", "mask = cache.pads_first(readable[:, 0, 0].int())", "mask = readable[:, 0, 0].int()"),
    ("hf", "keys stay where the pads were", "layer.keys = layer.keys.take_along_dim(order, dim=2)", "pass"),
    ("hf", "cache drops other rows", "batch_select_indices(rows)", "batch_select_indices(torch.arange(len(rows)))"),
    ("hf", "--temperature ignored", " / self.temperature", ""),
    ("hf", "a cut vocabulary keeps other columns", "nn.Parameter(output.weight[kept])", "nn.Parameter(output.weight[: len(kept)])"),
    ("hf_tokenizer", "end-of-text in a text is the special token", "split_special_tokens=True", "split_special_tokens=False"),
    ("hf_tokenizer", "pad is end-of-text", "self.pad_id = int(self.eos_id == 0)", "self.pad_id = self.eos_id"),
    ("hf", "special tokens without a row are kept", "ids.update(tokenizer.stop_ids, tokenizer.begin)", "ids.update(tokenizer.begin, tokenizer.original.all_special_ids)"),
    ("hf", "networks copy the base", "shared = {id(p): p for p in base.parameters() if config.frozen_base}", "shared = {}"),
    ("hf", "tokens of held-out files are dropped", 'glob(f"{name}*.csv")', 'glob(f"{name}.csv")'),
    ("hf", "the output matrix is in 4 bits", "layer is output or ", ""),
    ("hf", "rows of any length are in 4 bits", " or isinstance(layer, nn.Linear) and layer.in_features % BLOCK", ""),
    ("hf", "4 bits ignored", "if not four_bit:", "if True:"),
    ("hf", "layers in 4 bits are in eval mode", "            module.train()\n", ""),
    ("hf", "--base-dtype ignored", "options = loading_options(kind, init, four_bit, base_dtype)", "options = loading_options(kind, init, four_bit, 'float32')"),
    ("hf", "GPT-2's matrices stay transposed", "nn.Parameter(layer.weight.t())", "nn.Parameter(layer.weight)"),
    ("hf", "a model in 4 bits without adapters is trained", "self.requires_grad_(not config.frozen_base)", "pass"),
    ("hf", "checkpoints hold the base", "            self.register_state_dict_post_hook(HF.leave_out_base)\n", ""),
    ("hf_reward", "an encoder reads the pads", "attention_mask=real.int()", "attention_mask=None"),
    ("hf_reward", "always the first token", 'if self.gpt.config.pooled == "last":', "if False:"),
    ("hf_reward", "always the last token", 'if self.gpt.config.pooled == "last":', "if True:"),
    ("hf_reward", "scores without the fixed scale", "(self.head(first) - self.mean) / self.scale", "self.head(first)"),
    ("hf_reward", "a long text loses its end", "excess.unsqueeze(1) * (columns > 0)", "0 * columns"),
    ("hf_reward", "an encoder counts as a decoder", "if not torch.allclose(first[0], first[1]):", "if False:"),
    ("hf_tokenizer", "BERT's end-of-text is forgotten", "self.original.eos_token or self.original.sep_token", "self.original.eos_token or self.original.bos_token"),
    ("hf_tokenizer", "BERT's first token is forgotten", "(self.original.bos_token_id, self.original.cls_token_id)", "(self.original.bos_token_id,)"),
    ("gpt2", "matrices stay transposed", "weight.t() if transposed else weight", "weight"),
    ("gpt2", "an old pytorch_model.bin goes before model.safetensors", 'kinds[0] or kinds[1]', 'kinds[1] or kinds[0]'),
    ("gpt2", "only the first of several files is read", "kinds = [sorted(folder.glob(pattern)) for", "kinds = [sorted(folder.glob(pattern))[:1] for"),
    ("export", "the temperature is lost", "weight = weight / gpt.temperature", "pass"),
    ("export", "the temperature of an output matrix is lost", "output.weight / gpt.temperature", "output.weight"),
    ("export", "the temperature of a bias is lost", "output.bias /= gpt.temperature", "pass"),
    ("export", "a divided output matrix is tied again", "model.config.tie_word_embeddings = False", "pass"),
    ("export", "the output matrix stays the base's", '"lm_head": model.get_output_embeddings()', '"lm_head": None'),
    ("export", "GPT-2's matrices are not transposed", "weight = weight.t()\n", "pass\n"),
    ("export", "a cut vocabulary goes to the first rows", "else list(gpt.config.kept)", "else slice(len(weight))"),
    ("export", "scores without the fixed scale", "reward_model.head.weight / reward_model.scale", "reward_model.head.weight"),
    ("export", "the constant without the mean", "(reward_model.head.bias - reward_model.mean)", "reward_model.head.bias"),
    ("export", "an encoder's tanh is not linear", "SMALL = 1e-4", "SMALL = 1.0"),
    ("export", "PEFT gets another alpha", "lora_alpha=gpt.config.alpha", "lora_alpha=16"),
    ("tools_export", "PEFT's base is in full precision", "base.four_bit", "False"),
    ("export_tokenizer", "the system message is lost", "with_system(template, tokenizer.system)", "template"),
    ("export_tokenizer", "the pad is an end", "if made.pad_token_id in (None, end):", "if made.pad_token_id is None:"),
    ("export_tokenizer", "the line feed after the end is scored", "text.rstrip().removesuffix(END) + END", "text"),
    ("export_tokenizer", "no begin-of-text", "begin + CHAT_TEMPLATE", "CHAT_TEMPLATE"),
    ("export_tokenizer", "only one end token", "eos_token_id=ends,", "eos_token_id=ends[:1],"),
    ("export_tokenizer", "pieces are not those of the pattern", "pattern=encoding._pat_str, ", ""),
    ("export", "the settings of a GGUF file are written", "quantizer.remove_quantization_config(model)", "model.hf_quantizer = None"),
    ("tools_export", "differences are not looked at", "if not difference <= ", "if False and not difference <= "),
    ("tools_export", "any folder is replaced", "not (is_export and cfg.overwrite)", "not cfg.overwrite"),
    ("tools_export", "the base is replaced", "if base and Path(cfg.out).resolve() == Path(base).resolve():", "if False:"),
    ("optimum", "weights without the price of KL", "return scores / kl_coef", "return scores"),
    ("optimum", "KL to nothing", "log_best = log_weights + math.log(scores.size(1)) + log_q", "log_best = log_weights"),
    ("optimum", "best-of-n takes the worst", "up_to**n - below**n", "(1 - below) ** n - (1 - up_to) ** n"),
    ("optimum", "KL of best-of-n without its second term", "return math.log(n) - (n - 1) / n", "return math.log(n)"),
    ("optimum", "best-of-n without the weights of the mixture", "torch.softmax(-log_q, dim=1)", "torch.softmax(0 * log_q, dim=1)"),
    ("optimum", "tied scores counted twice", "v / (up_to - below), 0.0", "1.0, 0.0"),
    ("optimum", "mixture as a sum", " - math.log(len(log_ratios))", ""),
    ("optimum", "bias of few samples stays", "return 2 * estimator(samples, setting) - sum(halves) / 2", "return estimator(samples, setting)"),
    ("optimum", "jackknife of one half", "- sum(halves) / 2", "- halves[0]"),
    ("optimum", "standard error without the root of n", "errors.var(correction=0) / (len(errors) - 1)", "errors.var()"),
    ("optimum", "few prompts count like all", "pad((more - mean) * scale,", "pad(more - mean,"),
    ("optimum", "optimality where the best policy gains nothing", "    whole = torch.where(whole > 0, whole, math.nan)\n", ""),
    ("dpo", "DPO reversed", "bradley_terry_loss(r_chosen, r_rejected)", "bradley_terry_loss(r_rejected, r_chosen)"),
    ("dpo", "DPO without its reference", "beta * (policy_chosen - ref_chosen)  # (N,)\n    r_rejected = beta * (policy_rejected - ref_rejected)", "beta * policy_chosen\n    r_rejected = beta * policy_rejected"),
    ("dpo", "DPO without beta", "beta * (policy_chosen - ref_chosen)  # (N,)\n    r_rejected = beta * (policy_rejected - ref_rejected)", "policy_chosen - ref_chosen\n    r_rejected = policy_rejected - ref_rejected"),
    ("dpo", "DPO divides by beta", "beta * (policy_chosen - ref_chosen)  # (N,)\n    r_rejected = beta * (policy_rejected - ref_rejected)", "(policy_chosen - ref_chosen) / beta\n    r_rejected = (policy_rejected - ref_rejected) / beta"),
    ("dpo", "DPO counts the prompt", "response_mask(prompt_lens,", "response_mask(prompt_lens * 0 + 1,"),
    ("dpo", "DPO's reference is the policy", "response_logprobs(reference, tokens, mask)", "response_logprobs(policy, tokens, mask)"),
    ("dpo", "DPO averages over tokens", "token_logprobs(logits, tokens, mask).sum(dim=1)", "token_logprobs(logits, tokens, mask).mean(dim=1)"),
    ("dpo", "DPO's reference has a gradient", "        with torch.no_grad():\n", "        if True:\n"),
    ("checkpoints", "weights that are NaN are loaded", "if not tensor.isfinite().all():", "if False:"),
    ("checkpoints", "another input file is not noticed", 'if checkpoint["inputs"][name] != digests(file=file)["file"]:', "if False:"),
    ("checkpoints", "merged without the scale", "+ scale * B @ A", "+ B @ A"),
    ("training", "a new run replaces an old one", "elif not self.cfg.overwrite:", "elif False:"),
    ("training", "metrics are not in the checkpoint", '"metrics": self.rows,', '"metrics": [],'),
    ("training", "results of another run survive a resume", "file.unlink(missing_ok=True)", "pass"),
    ("checkpoints", "moments of any shape are loaded", "if moment.shape != parameter.shape or", "if"),
    ("checks", "noise is divided by its deviation", "if margin < max(1e-4, 1e-5 * abs(mean)):", "if False:"),
    ("checks", "a base in bfloat16 has the tolerance of float32", "amp is not None or any(p.dtype == torch.bfloat16 for p in model.parameters())", "amp is not None"),
    ("checks", "losses may be NaN", "for number in numbers if number is not None)", "for number in ())"),
    ("optimizer", "float16 skips steps without end", "if scaler.get_scale() < 1:", "if False:"),
    ("optimizer", "an infinite norm makes every gradient 0", "    first_gradient += torch.where(grad_norm.isfinite(), 0.0, torch.nan)\n", ""),
    ("optimizer", "gradients not summed over the processes", "    sum_gradients(model)\n", ""),
    ("processes", "gradients averaged over the processes", "vector_to_parameters(buffer, gradients)", "vector_to_parameters(buffer / WORLD, gradients)"),
    ("processes", "metrics not summed", "return gather(numbers[None]).sum(dim=0)", "return numbers"),
    ("micro_batches", "every process does all rows of a minibatch", "mine = share(rows)", "mine = rows"),
    ("heldout", "rows are held out, not prompts", 'frame["PromptCell"].isin(chosen)', "(frame.astype(str).sum(axis=1).map(hash_of) < share)"),
    ("heldout", "hash of the row's number", 'frame["PromptCell"].isin(chosen)', "(frame.index.astype(str).map(hash_of) < share)"),
    ("heldout", "held-out rows are trained on", '[frame["PromptCell"].isin(chosen) == heldout]', '[frame["PromptCell"].isin(chosen) | (not heldout)]'),
    ("heldout", "sides swapped", ".isin(chosen) == heldout]", ".isin(chosen) != heldout]"),
    ("heldout", "held-out file of another table", "COLUMNS[name].twin or name, heldout", '"prompts", heldout'),
    ("heldout", "rankings have a held-out file of their own", "COLUMNS[name].twin or name, heldout", "name, heldout"),
    ("heldout", "held-out file is trained on", "((twin,) if heldout else files)", "((twin,) if heldout else (*files, twin))"),
    ("heldout", "--heldout ignored", "choose_heldout(prompts, share)", "choose_heldout(prompts, HELDOUT_SHARE)"),
    ("heldout", "no prompt is left to train on", "min(max(count, 1), len(different) - 1)", "max(count, 1)"),
    ("heldout", "nothing is held out of a few prompts", "min(max(count, 1), len(different) - 1)", "min(count, len(different) - 1)"),
    ("heldout", "ties and skips are learned", 'kept = frame[frame["Answer"].isin(ANSWERS[:2])]', "kept = frame"),
    ("label_votes", "undo keeps the vote in the file", "            write_votes(self.path, self.votes[:-1])\n", ""),
    ("label_votes", "the second side is not swapped", 'if answer == "second" else (pair.first, pair.second)', 'if answer == "x" else (pair.first, pair.second)'),
    ("label_votes", "agreement goes by the side", 'return f"better: {self.chosen}" if self.answer in DECIDED else self.answer', "return self.answer"),
    ("label_votes", "skipped pairs disagree", 'if "skip" not in (votes[0].answer, votes[1].answer):', "if votes:"),
    ("label_pairs", "the file's better side comes first", '        random.Random(f"{seed} pair {number}").shuffle(sides)\n', ""),
    ("label_pairs", "the second pass keeps the sides", '            random.Random(f"{seed} again {vote.pair}").shuffle(sides)\n', ""),
    ("label_pairs", "the second pass keeps the order", '    pairs.sort(key=lambda pair: random.Random(f"{seed} order {pair.number}").random())\n', ""),
    ("label_terminal", "the last byte of a sequence votes", "return burst.lower() if len(burst) <= 1 else NO_KEY", "return burst[-1:].lower()"),
    ("label_terminal", "an ESC waits no longer than a key", 'QUIET_AFTER_ESCAPE if "\\x1b" in burst else QUIET', "QUIET"),
    ("label_terminal", "a sequence does not wait for its end", "(OPEN.search(burst) or more_comes(terminal, burst))", "more_comes(terminal, burst)"),
    ("label_terminal", "keys typed ahead vote", "        termios.tcflush(sys.stdin, termios.TCIFLUSH)\n", "        pass\n"),
    ("label_terminal", "control characters reach the terminal", "printable(text).split", "text.split"),
    ("label_web", "no token", "same and slash", "slash"),
    ("label_web", "any host", "host in hosts and ", ""),
    ("label_web", "any origin", 'origin == f"http://{host}" and ', ""),
    ("label_web", "an old page votes", "if number == present and (", "if ("),
    ("label_web", "votes at the same time", "        with self.lock:\n            labelling = self.labelling", "        if True:\n            labelling = self.labelling"),
    ("label_web", "any computer may connect", '("127.0.0.1", port)', '("0.0.0.0", port)'),
    ("label_web", "the same nonce for ever", "nonce = secrets.token_urlsafe(16)", 'nonce = "nonce"'),
    ("label_reward", "ties count", "vote.answer in DECIDED and ", ""),
    ("label_reward", "the model likes the rejected", "(chosen > rejected)", "(chosen < rejected)"),
    ("messages", "the user's and the assistant's words swapped", '"user": f"{HUMAN} ", "assistant": f"{ASSISTANT} "', '"user": f"{ASSISTANT} ", "assistant": f"{HUMAN} "'),
    ("messages", "the system's message is dropped", "for message in prompt]\n", 'for message in prompt if message["role"] != "system"]\n'),
    ("messages", "the assistant does not get the word", 'return "".join(turns) + ASSISTANT', 'return "".join(turns)'),
    ("messages", "a blank after the last Assistant:", 'return "".join(turns) + ASSISTANT', 'return "".join(turns) + BEGINNINGS["assistant"]'),
    ("messages", "the last turn is the first", 'prompt[-1]["content"]', 'prompt[0]["content"]'),
    ("messages", "the last turn of a text is the first", ".rpartition(HUMAN)[2]", ".split(HUMAN, 2)[-1 if HUMAN not in text else 1]"),
    ("messages", "a prompt may end with the assistant", 'if messages[-1]["role"] != "user":', "if False:"),
    ("reward_functions", "all weights are 1", "weights or (1.0,) * len(names)", "(1.0,) * len(names)"),
    ("reward_functions", "metrics of the rewards swapped", "names[-len(means) :]", "names[::-1]"),
    ("reward_functions", "the named function is not taken", "load_code(path, spec), attribute, None)", 'load_code(path, spec), "score", None)'),
    ("reward_functions", "two metrics of one name", "metrics.count(name) > 1", "False"),
    ("user_code", "functions share their lists", "score(list(prompts), list(responses))", "score(prompts, responses)"),
    ("user_code", "scores may be NaN", " or not all(map(math.isfinite, scores))", ""),
    ("user_code", "too many scores are cut", "    scores = [float(value) for value in values]", "    scores = [float(value) for value in values][: len(responses)]"),
    ("warnings", "advises to enlarge large scores", "multiply --reward-weights by {1 / score_std:.2g}", "multiply --reward-weights by {score_std:.2g}"),
    ("sample", "--temperature ignored", "        gpt.temperature *= cfg.temperature\n", ""),
    ("sample", "two system messages", 'if cfg.system and given[0]["role"] != "system":', "if cfg.system:"),
    ("sample", "gold of a question that the judge does not know", " and knows(response.prompt)", ""),
    ("sample", "every response has the same random numbers", "prompt, seed + number)", "prompt, seed)"),
    ("sample", "a dialogue loses its last turn", "fit(given[2:], policy, cfg)", "fit(given[:-2], policy, cfg)"),
    ("sample", "half a character is shown", '.rstrip("\\ufffd")', ""),
    ("sample", "control characters reach the terminal", "print(printable(text.removeprefix(self.shown))", "print(text.removeprefix(self.shown)"),
    ("responses", "random numbers of the place in the batch", "range(first, first + len(prompts))", "range(len(prompts))"),
    ("responses", "a resumed run begins with another batch", "divmod(done, cfg.sample_rows * len(policies))", "divmod(done, cfg.sample_rows)"),
    ("responses", "other batches after a resume", "range(batch * cfg.sample_rows, len(given)", "range(batch * cfg.sample_rows + skipped // len(policies), len(given)"),
    ("responses", "lines of a resumed batch are there twice", "lines[skipped:]", "lines"),
    ("responses", "each batch after a resume lacks lines", "        skipped = 0\n", ""),
    ("responses", "a torn line stays", "len(data) - len(torn)", "len(data)"),
    ("responses", "other weights of a checkpoint are not noticed", "[cfg.prompts, *cfg.checkpoint]", "[cfg.prompts]"),
    ("responses", "other prompts are not noticed", "[cfg.prompts, *cfg.checkpoint]", "[*cfg.checkpoint]"),
    ("responses", "another reward model is not noticed", "files.append(cfg.rewards().model)", "pass"),
    ("responses", "another judge is not noticed", "files.append(first.judge.__file__)", "pass"),
    ("responses", "other flags are not noticed", "repr((flags, digests))", "repr(digests)"),
    ("responses", "--overwrite replaces any file", "FIRST_KEY if overwrite", '"" if overwrite'),
    ("responses", "the file has the prompt as the policy reads it", "make_line(run, prompt, policy,", "make_line(run, response.prompt, policy,"),
    ("optimality", "weights are not the run's", 'config.get("reward_weights") or rewards.weights', "rewards.weights"),
    ("optimality", "rewards in any order", "if trained != list(files):", "if set(trained) != set(files):"),
    ("optimality", "a changed file is not noticed", "        check_input(path, checkpoint, name, file)\n", ""),
    ("optimality", "held-out prompts are not the run's", 'True, config["heldout"])', "True, 0.1)"),
    ("optimality", "fragments are scored as in a default run", 'missing_eos_score=config["missing_eos_score"]', "missing_eos_score=-3.0"),
    ("optimality", "limits are not drawn", "shortest_limit=limits[0]", "shortest_limit=0"),
    ("token_rows", "token before the action", "after.tokens[:, 1:]", "after.tokens[:, :-1]"),
    ("token_rows", "log-probabilities after the step are those before", '"new_logprob": after.logprobs', '"new_logprob": experience.old_logprobs'),
    ("token_rows", "reference after for before", '"ref_logprob": after.ref_logprobs', '"ref_logprob": after.logprobs'),
    ("report", "rare values of a long curve are lost", "frame.groupby(frame.index // step).first()", "frame[::step]"),
    ("report", "best responses for the worst", '["gold_after", "score_after"])', '["gold_after", "score_after"], ascending=False)'),
    ("report", "worst by score only", '["gold_after", "score_after"]', '["score_after"]'),
    ("report", "NA is an empty response", 'keep_default_na=False, na_values=""', "keep_default_na=True"),
    ("report", "texts of all rows", "    frame.loc[others, frame.columns.intersection(TEXTS)] = None\n", ""),
    ("report", "text ends its element", '.replace("<", "\\\\u003c")', ""),
    ("formats", "chosen and rejected swapped", '("rejected", "chosen"), ("rejected", "chosen")', '("rejected", "chosen"), ("chosen", "rejected")'),
    ("formats", "rankings reversed", '("prompt", *ranked), ranked)', '("prompt", *ranked), ranked[::-1])'),
    ("formats", "only neighbours of a ranking", "in combinations(sides, 2):", "in zip(sides, sides[1:]):"),
    ("formats", "thumbs swapped", 'THUMBS = {"true": "up", "1": "up", "up": "up", "false": "down", "0": "down", "down": "down"}', 'THUMBS = {"true": "down", "1": "down", "up": "down", "false": "up", "0": "up", "down": "up"}'),
    ("formats", "equal responses are a pair", "        if worse != better:\n", "        if True:\n"),
    ("formats", "responses to different prompts are compared", "    if any(other != cell for other, _ in sides):", "    if False:"),
    ("formats", "the prompt is the first turn of a dialogue", "text.rpartition(ASSISTANT)", "text.partition(ASSISTANT)"),
    ("formats", "the response repeats its prompt", "side.removeprefix(text) if text.endswith(ASSISTANT) else side", "side"),
    ("tables", "good and bad responses swapped", "(prompt, response, worse) for worse", "(prompt, worse, response) for worse"),
    ("tables", "bad responses to other prompts", "bad.get(prompt, [])", "sum(bad.values(), [])"),
    ("tables", "a bad response is a demonstration", "for row in better if row not in worse)", "for row in better)"),
    ("tables", "tables are split differently", "        heldout |= choose_heldout(", "        heldout = choose_heldout("),
    ("tables", "split by the whole dialogue", "return first_turn(read_prompt(row[0]))", "return row[0]"),
    ("tables", "tokenizer trained on held-out text", '        if name.endswith("_heldout.csv"):\n            continue\n', ""),
    ("tables", "no room for PPO's response", ".clip(lower=room).fillna(room)", ".fillna(0)"),
    ("device_sampling", "the host waits twice for each token", "if len(kept) == 0 or t == N - 1:", "if not state.going.any() or t == N - 1:"),
    ("device_sampling", "the mask is made on the host", "response_mask(prompt_lens, batch.lengths, width)", "response_mask(prompt_lens.cpu(), batch.lengths.cpu(), width)"),
    ("device_rollout", "the mask is moved to the host", "tokens[rows], mask[rows], prompt_lens[rows]", "tokens[rows], mask[rows].cpu(), prompt_lens[rows]"),
    ("device_ppo", "each loss is copied to the CPU", "history.add(weight, metrics)", "history.add(weight, {name: x.cpu() for name, x in metrics.items()})"),
    ("device_train_ppo", "the CPU's generator draws for the device", 'make_generator(compute.device, cfg.seed, "rollout", step)', 'make_generator("cpu", cfg.seed, "rollout", step)'),
]  # fmt: skip

# ---- running ----


class FirstFailure:
    """A pytest plugin that writes the id of the first test that fails."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        self.note(report)

    def pytest_collectreport(self, report):
        self.note(report)

    def note(self, report):
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)


def run_tests(tests: list[str], quiet: bool) -> str | None:
    """The first test that fails, or None. A forked child runs them, so that torch is imported once
    for all."""
    path = Path("first_failure.txt")
    path.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        signal.alarm(TIMEOUT)
        if quiet:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
        flags = "-x -q --rootdir . -p no:cacheprovider -o addopts=".split()
        os._exit(pytest.main([*flags, *tests], plugins=[FirstFailure(path)]))
    status = os.waitpid(child, 0)[1]
    if status == 0:
        return None
    return path.read_text() if path.exists() else f"the limit of {TIMEOUT} seconds"


def killer(suite: str, old: str, new: str) -> str | None:
    """The first test that fails on a mutant, or None."""
    file, tests = SUITES[suite]
    path = Path(file)
    source = path.read_text()
    path.write_text(source.replace(old, new))
    try:
        return run_tests(tests, quiet=True)
    finally:
        path.write_text(source)


def copy_repository(folder: Path) -> None:
    """What the tests need, and make it the working directory."""
    for name in ("rlhf", "tests", "data", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("train_*.py"):
        shutil.copy(path, folder)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True


def check(suites: list[str], mutants: list[tuple]) -> None:
    """Exit with a message if a text is not there once, or if tests fail without a mutant."""
    for suite, mistake, old, _ in mutants:
        count = (ROOT / SUITES[suite][0]).read_text().count(old)
        if count != 1:
            sys.exit(f"error: {suite}, {mistake}: the text is there {count} times: {old!r}")
    for suite in suites:
        failure = run_tests(SUITES[suite][1], quiet=False)
        if failure:
            sys.exit(f"error: {suite}: {failure} fails without a mutant, see above")


# ---- results ----


def write_table(results: list[tuple[str, str, str | None]]) -> None:
    lines = [
        "# Known mistakes, and the tests that catch them",
        "",
        "Written by `python tests/mutants.py --table`, which makes each mistake in a copy of the",
        "repository. The last column is the first test that fails.",
        "",
        "| file | mistake | killed by |",
        "|---|---|---|",
    ]
    for suite, mistake, test in results:
        shown = f"`{test}`".replace("|", "\\|") if test else "**survived**"
        lines.append(f"| `{SUITES[suite][0]}` | {mistake} | {shown} |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Which test catches which mistake?")
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)} (default: all)")
    parser.add_argument("--table", action="store_true", help="write tests/mutants.md")
    args = parser.parse_args()
    unknown = set(args.suites) - SUITES.keys()
    if unknown:
        parser.error(f"no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    missing = {suite for suite, name in OPTIONAL.items() if not importlib.util.find_spec(name)}
    suites = args.suites or [suite for suite in SUITES if suite not in missing]
    if args.table and len(suites) < len(SUITES):
        parser.error("--table needs all suites, and the packages of " + ", ".join(OPTIONAL))
    mutants = [mutant for mutant in MUTANTS if mutant[0] in suites]

    results = []
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(Path(folder))
        check(suites, mutants)
        for number, (suite, mistake, old, new) in enumerate(mutants, start=1):
            test = killer(suite, old, new)
            results.append((suite, mistake, test))
            outcome = f"killed by {test}" if test else "SURVIVED"
            print(f"{number}/{len(mutants)} {suite}: {mistake}: {outcome}", flush=True)
    if args.table:
        write_table(results)
    survivors = [result for result in results if not result[2]]
    print(f"\n{len(results) - len(survivors)} of {len(results)} killed")
    for suite, mistake, _ in survivors:
        print(f"survived: {suite}: {mistake}")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
