"""Importing a module changes nothing. (tests/test_repo.py has what a default run loads.)"""

import subprocess
import sys

from tests.helpers import ROOT

OPTIONAL = (
    "accelerate",
    "bitsandbytes",
    "gguf",
    "matplotlib",
    "safetensors",
    "tensorboard",
    "transformers",
    "trl",
)

# The state of Python is taken first, that of torch once it is imported.
IMPORT_ALL = """
import importlib, os, pkgutil, random, signal, sys, threading
for name in OPTIONAL:
    sys.modules[name] = None  # as if it were not installed

def python_state():
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook)
    streams = (sys.stdin, sys.stdout, sys.stderr, *[s.errors for s in (sys.stdout, sys.stderr)])
    return handlers, hooks, streams, sys.argv, sys.path, os.getcwd(), random.getstate()

def torch_state():
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.get_rng_state().tolist(),
        torch.distributed.is_initialized(),
    )

python_before = python_state()
import torch
torch_before = torch_state()
import rlhf
names = [module.name for module in pkgutil.walk_packages(rlhf.__path__, "rlhf.")]
assert {"rlhf.ppo", "rlhf.run.program", "rlhf.networks.hf"} <= set(names)
for name in names:
    importlib.import_module(name)
    assert python_state() == python_before, name
    assert torch_state() == torch_before, name
print("unchanged")
"""


def test_importing_any_module_changes_nothing():
    """Neither how a program ends nor a default of torch. The optional packages are absent."""
    source = f"OPTIONAL = {OPTIONAL}\n{IMPORT_ALL}"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("unchanged\n", 0), done.stderr
