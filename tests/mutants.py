"""A catalogue of the mistakes that RLHF code is known for, and a program that makes each one and checks for a red test.

    python tests/mutants.py                      # all, about 40 minutes; Linux or macOS; not collected by pytest
    python tests/mutants.py rewards train_ppo    # only those of some files

Two lists. HAND: the known mistakes, in the maths and in how the scripts put it together; each replaces one piece of text
by another. By machine: every comparison, operator and number in the four maths files, changed one at a time. A mutant
that no test notices survives and is printed. A survivor of HAND makes the exit status 1. docs/results.md has the last
score. TESTS says which tests belong to which file.
"""

import ast
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
FILES = ("masked", "losses", "rewards", "advantages")
PATHS = {**{name: f"rlhf/{name}.py" for name in (*FILES, "rollout")},
         **{name: f"rlhf/extras/{name}.py" for name in ("optimum", "lora", "hf", "ptx", "yardsticks", "alternatives", "parallel")},
         **{name: f"rlhf/support/{name}.py" for name in ("checkpoints", "runtime")},
         **{name: f"{name}.py" for name in ("train_sft", "train_reward", "train_ppo")},
         "several_processes": "train_ppo.py"}
UPDATES, WIRING = "tests/scripts/test_updates.py", "tests/scripts/test_wiring.py"
ADVANTAGE = "tests/scripts/test_advantage.py"
TESTS = {
    **{name: [f"tests/core/test_{name}.py"] for name in FILES},
    "optimum": ["tests/extras/test_optimum.py"],
    "alternatives": ["tests/extras/test_alternatives.py", "-k", "not reaches"],
    "parallel": ["tests/extras/test_parallel.py", "-k", "float64 and 2"],
    "several_processes": ["tests/extras/test_parallel.py", "-k", "float64 and 2"],
    "lora": ["tests/extras/test_lora.py", "-k", "not (scripts or checkpoint or loaded or resumed or fine_tuning or full_training)"],
    "hf": ["tests/extras/test_hf.py", "-k", "not (facts or first_loss or finished or stage or resume or programs or refuse or named)"],
    "ptx": ["tests/extras/test_ptx.py"],
    "yardsticks": [WIRING],
    "checkpoints": ["tests/support/test_checkpoints.py", "tests/extras/test_lora.py", "-k", "not (scripts or loaded or resumed or fine_tuning or full_training)"],
    "runtime": ["tests/support/test_runtime.py"],
    "rollout": ["tests/core/test_rollout.py", WIRING],
    "train_ppo": [UPDATES, WIRING, ADVANTAGE],
    "train_reward": [UPDATES, WIRING],
    "train_sft": [UPDATES, WIRING],
}

HAND = [
    ("masked", "whiten keeps the mean", "(x - mean) * torch.rsqrt", "x * torch.rsqrt"),
    ("masked", "whiten variance over pads", "var = masked_mean((x - mean) ** 2, mask)", "var = ((x - mean) ** 2).mean()"),
    ("masked", "mean ignores the mask", "torch.where(mask, x, 0.0).sum() / mask.sum()", "x.mean()"),
    ("masked", "mean multiplies by the mask", "torch.where(mask, x, 0.0).sum()", "(x * mask).sum()"),
    ("masked", "log-probability without the shift", "logprobs[row, tokens[:, 1:]]", "logprobs[row, tokens[:, :-1]]"),
    ("masked", "logits shifted the other way", "logits[rows, slots]", "logits[rows, slots + 1]"),
    ("masked", "log-probabilities of another slot", "(mask.flatten().cumsum(dim=0) - 1)", "mask.flatten().cumsum(dim=0)"),
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
    ("losses", "PPO min and max swapped", "torch.maximum(unclipped, clipped), mask)\n    return loss, masked_mean((clipped > unclipped).float(), mask)\n\n\ndef value_loss", "torch.minimum(unclipped, clipped), mask)\n    return loss, masked_mean((clipped > unclipped).float(), mask)\n\n\ndef value_loss"),
    ("losses", "advantage sign", "unclipped = -advantages * ratio", "unclipped = advantages * ratio"),
    ("losses", "ratio inverted", "new_logprobs - old_logprobs, 0.0", "old_logprobs - new_logprobs, 0.0"),
    ("losses", "clip fraction as |r - 1| > eps", "return loss, masked_mean((clipped > unclipped).float(), mask)\n\n\ndef value_loss", "return loss, masked_mean(((ratio - 1).abs() > clip_eps).float(), mask)\n\n\ndef value_loss"),
    ("losses", "value loss without a half", "0.5 * masked_mean", "masked_mean"),
    ("losses", "value clip takes the smaller", "0.5 * masked_mean(torch.maximum", "0.5 * masked_mean(torch.minimum"),
    ("losses", "value clip fraction counts a V at the edge", ".abs() > clip_eps", ".abs() >= clip_eps"),
    ("losses", "value clip fraction counts equal branches", "(beyond & (clipped > unclipped))", "(beyond & (clipped >= unclipped))"),
    ("losses", "value clip centred on the returns", "clipped_values = old_values + (new_values - old_values)", "clipped_values = returns + (new_values - returns)"),
    ("losses", "Bradley-Terry reversed", "logsigmoid(chosen_scores - rejected_scores)", "logsigmoid(rejected_scores - chosen_scores)"),
    ("losses", "log of sigmoid", "-F.logsigmoid(chosen_scores - rejected_scores)", "-torch.log(torch.sigmoid(chosen_scores - rejected_scores))"),
    ("optimum", "weights without the price of KL", "scores / kl_coef", "scores"),
    ("optimum", "KL to nothing", "weights * (log_weights + math.log(scores.size(1)) + log_q)", "weights * log_weights"),
    ("optimum", "best-of-n takes the worst", "scores.argsort(dim=1, stable=True)", "(-scores).argsort(dim=1, stable=True)"),
    ("optimum", "KL of best-of-n without its second term", "math.log(n) - (n - 1) / n", "math.log(n)"),
    ("alternatives", "groups of every G-th row", "scores.view(-1, group_size)", "scores.view(group_size, -1).t()"),
    ("alternatives", "RLOO's mean holds the response itself", " * (group_size / (group_size - 1))", ""),
    ("alternatives", "GRPO never divides", "centred * torch.rsqrt(var + 1e-8) if divide else centred", "centred"),
    ("alternatives", "GRPO always divides", "centred * torch.rsqrt(var + 1e-8) if divide else centred", "centred * torch.rsqrt(var + 1e-8)"),
    ("alternatives", "GRPO divides by the variance", "torch.rsqrt(var + 1e-8)", "1 / (var + 1e-8)"),
    ("alternatives", "GRPO's deviation over the whole batch", "(centred**2).mean(dim=1, keepdim=True)", "(centred**2).mean()"),
    ("alternatives", "REINFORCE compares within groups", 'len(R) if advantage == "reinforce" else group_size', "group_size"),
    ("alternatives", "advantages not masked", "torch.where(mask, advantages.unsqueeze(1), 0.0)", "advantages.unsqueeze(1).expand(mask.shape)"),
    ("alternatives", "returns are advantages", "torch.zeros_like(rewards)", "torch.where(mask, advantages.unsqueeze(1), 0.0)"),
    ("alternatives", "DPO reversed", "bradley_terry_loss(beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected))", "bradley_terry_loss(beta * (policy_rejected - ref_rejected), beta * (policy_chosen - ref_chosen))"),
    ("alternatives", "DPO without its reference", "beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)", "beta * policy_chosen, beta * policy_rejected"),
    ("alternatives", "DPO without beta", "beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)", "policy_chosen - ref_chosen, policy_rejected - ref_rejected"),
    ("alternatives", "DPO divides by beta", "beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)", "(policy_chosen - ref_chosen) / beta, (policy_rejected - ref_rejected) / beta"),
    ("alternatives", "DPO counts the prompt", "response_mask(prompt_lens,", "response_mask(prompt_lens * 0 + 1,"),
    ("alternatives", "DPO's reference is the policy", "token_logprobs(reference.hidden(tokens), tokens, mask, reference.logits)", "token_logprobs(policy.hidden(tokens), tokens, mask, policy.logits)"),
    ("alternatives", "DPO averages over tokens", "mask, policy.logits).sum(dim=1)", "mask, policy.logits).mean(dim=1)"),
    ("alternatives", "DPO's reference has a gradient", "        with torch.no_grad():\n            theirs", "        if True:\n            theirs"),
    ("train_ppo", "groups are not consecutive", "for i in rows for _ in range(cfg.group_size)]", "for _ in range(cfg.group_size) for i in rows]"),
    ("train_ppo", "as many prompts as responses", "cfg.batch_size // cfg.group_size", "cfg.batch_size"),
    ("train_ppo", "a value network with every advantage", "if cfg.advantage == \"gae\"\n              else", "if True\n              else"),
    ("train_ppo", "always RLOO", "rollout.mask, cfg.advantage, cfg.group_size)", 'rollout.mask, "rloo", cfg.group_size)'),
    ("train_ppo", "advantages from the score only", "response_advantages(rewards,", "response_advantages(rewards + kl_coef * (rollout.logprobs - rollout.ref_logprobs),"),
    ("lora", "scale without the rank", "torch.tensor(ALPHA / rank)", "torch.tensor(ALPHA)"),
    ("checkpoints", "weights that are NaN are loaded", "if not tensor.isfinite().all()]", "if False]"),
    ("checkpoints", "a new run replaces an old one", "if old and not config.overwrite:", "if False:"),
    ("checkpoints", "another input file is not noticed", 'if checkpoint["inputs"][name] != digests(file=file)["file"]:', "if False:"),
    ("checkpoints", "metrics are not in the checkpoint", '"metrics": progress.rows,', '"metrics": [],'),
    ("runtime", "losses may be NaN", "for number in numbers if number is not None]", "for number in ()]"),
    ("runtime", "float16 skips steps without end", "if scaler.get_scale() < 1:", "if False:"),
    ("checkpoints", "merged without the scale", "+ scale * B @ A", "+ B @ A"),
    ("lora", "B does not start at zero", "torch.zeros(linear.out_features, rank)", "torch.ones(linear.out_features, rank)"),
    ("lora", "frozen network is trained too", "        gpt.requires_grad_(False)\n", ""),
    ("lora", "reference shares the adapters", "for p in gpt.parameters() if not p.requires_grad})", "for p in gpt.parameters()})"),
    ("lora", "reference copies the weights under the adapters", "copy.deepcopy(gpt, {id(p): p for p in gpt.parameters() if not p.requires_grad})", "copy.deepcopy(gpt)"),
    ("hf", "begin-of-text is forgotten", "shift = int(begin is not None)", "shift = 0"),
    ("hf", "begin-of-text of a model that expects none", ' and self.theirs("")["input_ids"][:1] == [bos]', ""),
    ("hf", "positions without begin-of-text", "positions + shift", "positions"),
    ("hf", "pads between prompt and response are read", "attention_mask=mask", "attention_mask=None"),
    ("hf", "the sliding window counts pads", "cache.pads_first(F.pad(readable[:, 0, 0].int(), (shift, 0), value=1))", "F.pad(readable[:, 0, 0].int(), (shift, 0), value=1)"),
    ("hf", "keys stay where the pads were", "x.take_along_dim(order, dim=2)", "x"),
    ("hf", "cache drops other rows", "batch_select_indices(rows)", "batch_select_indices(torch.arange(len(rows)))"),
    ("hf", "--temperature ignored", " / self.temperature", ""),
    ("hf", "a cut vocabulary keeps other columns", "nn.Parameter(output.weight[list(kept)].detach())", "nn.Parameter(output.weight[: len(kept)].detach())"),
    ("hf", "end-of-text in a text is the special token", "split_special_tokens=True", "split_special_tokens=False"),
    ("hf", "pad is end-of-text", "int(self.new[eos] == 0)", "self.new[eos]"),
    ("hf", "special tokens without a row are kept", "{tokenizer.eos_id, tokenizer.begin} - {None}", "set(tokenizer.theirs.all_special_ids)"),
    ("hf", "networks copy the base", "for p in module.parameters() if config.rank}", "for p in module.parameters() if False}"),
    ("hf", "checkpoints hold the base", "            self.register_state_dict_post_hook(HF.leave_out_base)\n", ""),
    ("train_ppo", "entropy sign", "- cfg.entropy_coef * mb_entropy", "+ cfg.entropy_coef * mb_entropy"),
    ("train_ppo", "value loss without its weight", "cfg.value_coef * v_loss", "v_loss"),
    ("train_ppo", "value loss left out", "pg_loss + cfg.value_coef * v_loss", "pg_loss"),
    ("train_ppo", "ratio not clipped", "mb.mask, cfg.clip_eps)", "mb.mask, 1e9)"),
    ("train_ppo", "--value-clip-eps ignored", "mb.mask, cfg.value_clip_eps)", "mb.mask, math.inf)"),
    ("train_ppo", "kl_old the wrong way round", "kl_k3(mb.logprobs, new_logprobs.detach())", "kl_k3(new_logprobs.detach(), mb.logprobs)"),
    ("train_ppo", "the same order in each inner epoch", '"update", step, epoch)', '"update", step)'),
    ("train_ppo", "the same order in each step", '"update", step, epoch)', '"update", epoch)'),
    ("train_ppo", "metrics weighted by one instead of the share", "means.add(share,", "means.add(1.0,"),
    ("ptx", "the same demonstrations in each step", "cfg.minibatch_size) + gradient_step", "cfg.minibatch_size) * 0"),
    ("ptx", "no coefficient", "cfg.ptx_coef * loss", "loss"),
    ("train_ppo", "micro-batches not weighted", "scaler.scale(share * loss)", "scaler.scale(loss)"),
    ("train_ppo", "gradient not cleared between minibatches", "            optimizer.zero_grad()\n", ""),
    ("train_ppo", "gamma and lambda swapped", "rollout.mask, cfg.gamma, cfg.lam)", "rollout.mask, cfg.lam, cfg.gamma)"),
    ("train_ppo", "KL rewarded", "rollout.ref_logprobs, rollout.mask, kl_coef)", "rollout.ref_logprobs, rollout.mask, -kl_coef)"),
    ("train_ppo", "score negated", "shape_rewards(rollout.scores,", "shape_rewards(-rollout.scores,"),
    ("train_ppo", "advantages negated", "advantages = masked_whiten(", "advantages = -masked_whiten("),
    ("train_ppo", "advantages not whitened", "advantages = masked_whiten(advantages, rollout.mask)", "pass"),
    ("train_ppo", "kl_coef not adapted", "kl_coef = adapt_kl_coef(", "adapt_kl_coef("),
    ("train_ppo", "rate not scheduled", "cfg.lr * runtime.linear_schedule(step, cfg.steps, cfg.warmup)", "cfg.lr"),
    ("train_ppo", "policy decays", "weight_decay=0.0, eps=1e-5", "weight_decay=0.1, eps=1e-5"),
    ("train_ppo", "--missing-eos-score ignored", "cfg.missing_eos_score, cfg.micro", "-3.0, cfg.micro"),
    ("train_ppo", "--temperature ignored", "gpt.temperature = cfg.temperature", "pass"),
    ("train_ppo", "first ratio not looked at", "        report.check_first_step(step, kl_ref", "        (lambda *a: 0)(step, kl_ref"),
    ("train_ppo", "reference is the policy", "policy_gpt, reference = trained_and_frozen(gpt, cfg.lora_rank, generator)", "policy_gpt = reference = gpt"),
    ("train_ppo", "value network is the reward model", "value_gpt, reward_model.gpt = trained_and_frozen(reward_model.gpt, cfg.lora_rank, generator)", "value_gpt = reward_model.gpt"),
    ("train_ppo", "the reward model's network is trained", "value_gpt, reward_model.gpt = trained_and_frozen(", "reward_model.gpt, value_gpt = trained_and_frozen("),
    ("rollout", "the reference responds", "policy.gpt, prompts, prompt_lens, frozen", "frozen.reference, prompts, prompt_lens, frozen"),
    ("rollout", "pads between prompt and response are read", "no_pad[:, None, None, : P + t] if ragged else None", "None"),
    ("rollout", "positions count the pads", "cache, last.unsqueeze(1), readable)", "cache, None, readable)"),
    ("rollout", "one random number for all rows", "uniforms[rows, t]", "uniforms[rows[:1], t].expand(len(rows))"),
    ("rollout", "cache keeps the rows that have ended", "cache.keep(kept)", "cache.keep(torch.arange(len(kept)))"),
    ("rollout", "end-of-text is not part of the response", "lengths[rows] += going\n        going = going & (sampled != eos_id)", "going = going & (sampled != eos_id)\n        lengths[rows] += going"),
    ("train_ppo", "each minibatch divides by its own actions", "rollout.mask.sum().double() * len(rows) / len(order)", "rollout.mask[rows].sum().double()"),
    ("rollout", "reference scored by the policy", "ref_hidden = frozen.reference.hidden(tokens[rows])", "ref_hidden = hidden"),
    ("train_reward", "accuracy reversed", "share_positive(chosen - rejected)", "share_positive(rejected - chosen)"),
    ("train_reward", "not started from the fine-tuned model", "gpt = add_adapters(gpt,", "gpt = add_adapters(type(gpt)(gpt.config),"),
    ("yardsticks", "swapped prompts are not", "row._replace(prompt=prompts[i])", "row"),
    ("train_reward", "evaluated on the training rows", "\"comparisons\", heldout=True)", "\"comparisons\")"),
    ("train_sft", "validated on the training rows", "gpt.config.block_size, heldout=True)", "gpt.config.block_size)"),
    ("train_sft", "micro-batches not weighted", "* (mask.sum() / response_tokens)\n            scaler", "\n            scaler"),
    ("train_reward", "micro-batches not weighted", "part_loss * (len(part) / len(rows))", "part_loss * 1"),
    ("parallel", "gradients averaged over the processes", "gradient.copy_(part.view_as(gradient))", "gradient.copy_(part.view_as(gradient) / WORLD)"),
    ("parallel", "random numbers belong to processes", "*map(share, (prompts, prompt_lens, uniforms)))", "*map(share, (prompts, prompt_lens)), uniforms[: len(share(prompts))])"),
    ("parallel", "rollout not gathered", "Rollout(*map(gather, mine))", "Rollout(*mine)"),
    ("parallel", "metrics not summed", "gather(values).sum(dim=0)", "values.sum(dim=0)"),
    ("parallel", "loss not summed", "return summed[-1]", "return loss"),
    ("several_processes", "mean of the processes' own means", "rollout.mask.sum().double() * len(rows) / len(order)", "rollout.mask[parallel.share(rows)].sum().double() * parallel.WORLD"),
    ("several_processes", "every process does all rows", "parallel.share(rows).split(", "rows.split("),
    ("several_processes", "gradients not summed", "minibatch_kl_old = parallel.sum_gradients(policy, minibatch_kl_old)", "pass"),
    ("train_sft", "rate not scheduled", "cfg.lr * runtime.cosine_schedule(step, cfg.steps, cfg.warmup)", "cfg.lr"),
]  # fmt: skip

SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.Gt: ast.LtE, ast.Lt: ast.GtE, ast.GtE: ast.Gt, ast.LtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def machine_mutants(source: str):
    """(line, what was changed, new source) for each operator, comparison, number and minus."""
    count = sum(1 for _ in ast.walk(ast.parse(source)))
    for index in range(count):
        tree = ast.parse(source)
        node = list(ast.walk(tree))[index]
        changes = []
        if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
            changes.append(("op", SWAPS[type(node.op)]()))
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            changes.append(("ops", [SWAPS[type(node.ops[0])]()]))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            changes += [("value", node.value + 1), ("value", -node.value if node.value else -1)]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            changes.append(("op", ast.UAdd()))
        for field, value in changes:
            before = ast.unparse(node)
            old = getattr(node, field)
            setattr(node, field, value)
            yield node.lineno, f"{before}  ->  {ast.unparse(node)}", ast.unparse(ast.fix_missing_locations(tree))
            setattr(node, field, old)


def file_of(copy: Path, name: str) -> Path:
    return copy / PATHS[name]


def killed(copy: Path, name: str, source: str, quiet: bool = True) -> bool:
    """Do the tests of a file fail on this source? A forked child runs them, so that torch is imported once for all.
    A child that hangs is killed by its alarm, which counts."""
    path = file_of(copy, name)
    original = path.read_text()
    path.write_text(source)
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        if quiet:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:doctest", "-o", "addopts=",
                              *TESTS[name]]))
    status = os.waitpid(child, 0)[1]
    path.write_text(original)
    return status != 0


def main(names: list[str]) -> None:
    if unknown := set(names) - TESTS.keys():
        sys.exit(f"error: no mutants of {', '.join(unknown)}; there are some of {', '.join(TESTS)}")
    optional = set() if importlib.util.find_spec("transformers") else {"hf"}  # its tests are skipped then
    names = names or [name for name in TESTS if name not in optional]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("rlhf", "tests", "data"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.glob("train_*.py"):
            shutil.copy(path, copy)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        sys.dont_write_bytecode = True
        for name in names:
            if killed(copy, name, file_of(copy, name).read_text(), quiet=False):
                sys.exit(f"error: the tests of {name} are red without a mutant, see above")
        mutants, hand = [], [mutant for mutant in HAND if mutant[0] in names]
        for name, what, old, new in hand:
            source = file_of(copy, name).read_text()
            assert source.count(old) == 1, f"{name}: {what}: found {source.count(old)} times"
            mutants.append((name, f"by hand: {what}", source.replace(old, new)))
        for name in [name for name in FILES if name in names]:
            for line, what, source in machine_mutants(file_of(copy, name).read_text()):
                mutants.append((name, f"line {line}: {what}", source))
        survivors = []
        for number, (name, what, source) in enumerate(mutants, start=1):
            dead = killed(copy, name, source)
            if not dead:
                survivors.append(f"{name}.py {what}")
            print(f"{number}/{len(mutants)} {'killed  ' if dead else 'SURVIVED'} {name}.py {what}", flush=True)
    by_hand = sum("by hand" in survivor for survivor in survivors)
    print(f"\nby hand: {len(hand) - by_hand} of {len(hand)} killed; by machine: "
          f"{len(mutants) - len(hand) - len(survivors) + by_hand} of {len(mutants) - len(hand)} killed")
    for survivor in survivors:
        print("survived:", survivor)
    sys.exit(bool(by_hand))


if __name__ == "__main__":
    main(sys.argv[1:])
