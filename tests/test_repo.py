"""Promises about the repository: the packages, the house, how dense the code is, how long the pages
are, and that README names things that exist."""

import ast
import re
import shutil
import subprocess
import sys

import pytest

from tests.density import Density
from tests.helpers import ROOT


def files(*patterns):
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


CORE = files("*.py", "rlhf/*.py")  # the reading path
OPTIONS = files("rlhf/*/*.py")
SOURCES = [*CORE, *OPTIONS, *files("data/**/*.py", "docs/**/*.py", "tests/**/*.py")]


def text(path):
    return path.read_text(encoding="utf-8")


# ---- packages ----

FIVE = {"torch", "numpy", "tiktoken", "pandas", "pytest", "filelock"}  # torch brings filelock
OWN = {"rlhf", "train_sft", "train_reward", "train_ppo", "tests", "docs", "data", "judge", "linear"}
OPTIONAL = {
    "data/hh_rlhf/judge.py": {"profanity_check"},
    "data/hh_rlhf/harmless.py": {"sklearn"},
    "docs/experiments/trl.py": {"transformers", "trl"},
    "rlhf/networks/gpt2.py": {"safetensors"},
    "docs/experiments/plot.py": {"matplotlib"},
    "tests/experiments/test_plot.py": {"tensorboard"},
}


def imports(path):
    """The modules that a file imports, also inside functions; of `from rlhf.run import device` that
    is rlhf.run.device."""
    found = []
    for node in ast.walk(ast.parse(text(path))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [imported(node.module, alias.name) for alias in node.names]
    return found


def imported(module, name):
    file = ROOT / f"{module}.{name}.py".replace(".", "/", module.count(".") + 1)
    return f"{module}.{name}" if file.is_file() else module


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_needs_only_five_packages(path):
    name = path.relative_to(ROOT).as_posix()
    allowed = FIVE | OWN | set(sys.stdlib_module_names) | OPTIONAL.get(name, set())
    assert {module.split(".")[0] for module in imports(path)} <= allowed


# ---- the house ----

MATHS = {"rlhf.masked", "rlhf.losses", "rlhf.rewards", "rlhf.advantages"}
# What each room may import of the project. run/ imports the core's networks and tokenizers, to load
# them, and in one place, rlhf/run/loading.py, other networks.
MAY_IMPORT = {
    "maths": {"maths"},
    "core": {"maths", "core", "run"},
    "run": {"run"},
    "networks": {"maths", "core", "run", "networks"},
    "methods": {"maths", "core", "run", "methods"},
    "tools": {"maths", "core", "run", "networks", "methods", "tools"},
}
LOADED_BY_RUN = {"rlhf.model", "rlhf.tokenizer"}
DISPATCH = "rlhf.run.loading"


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module):
    """ "rlhf.run.device" -> "run"; "rlhf.data" -> "core"; "torch" -> None."""
    parts = module.split(".")
    if parts[0] != "rlhf":
        return None
    if module in MATHS:
        return "maths"
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "core"


@pytest.mark.parametrize("path", files("rlhf/**/*.py"), ids=module_name)
def test_imports_go_one_way(path):
    """maths <- core <- networks, methods <- tools; nothing imports a script."""
    here = module_name(path)
    allowed = MAY_IMPORT[room(here)]
    for module in imports(path):
        assert not module.startswith("train_"), module
        if room(here) == "run" and module in LOADED_BY_RUN:
            continue
        if here == DISPATCH and room(module) == "networks":
            continue
        if room(here) == "core" and room(module) in ("networks", "methods"):
            raise AssertionError(f"{here} imports the option {module}")
        assert room(module) is None or room(module) in allowed, module


def test_imports_have_no_circle():
    """Modules without a module that is left are taken away, until none is left. The dispatch is
    looked at from its own side only: it imports networks inside its functions."""
    paths = {module_name(path): path for path in files("rlhf/**/*.py")}
    left = {}
    for name, path in paths.items():
        left[name] = {module for module in imports(path) if module in paths}
    free = True
    while free:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        for name in free:
            del left[name]
    assert not left


def test_maths_needs_only_torch():
    for name in MATHS:
        path = ROOT / f"{name.replace('.', '/')}.py"
        others = set(imports(path)) - MATHS
        assert others <= {"torch", "torch.nn.functional"}, name
    assert not [name for name in imports(ROOT / "rlhf/model.py") if name.startswith("rlhf")]


@pytest.mark.slow
def test_default_run_loads_no_option():
    """In a fresh process, importing the three scripts loads the core and run/ only."""
    code = "import sys, train_sft, train_reward, train_ppo; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rooms = {room(module) for module in loaded.split()}
    assert rooms == {None, "maths", "core", "run"}


# ---- density ----

LIMITS = {"mean": 8.0, "p95": 18, "largest": 40, "function": 40, "parameters": 7}
NODES = {"reading path": 9_000, "the rest": 18_000}
ROOMS = {"core": CORE}
for _path in OPTIONS:
    ROOMS.setdefault(_path.parent.name, []).append(_path)


def measure(paths):
    return [Density(text(path), path.relative_to(ROOT).as_posix()) for path in paths]


@pytest.mark.parametrize("name", ROOMS)
def test_statements_are_short(name):
    sizes = []
    large = []
    for density in measure(ROOMS[name]):
        sizes += density.sizes
        large += [place for place in density.large if place[0] > LIMITS["largest"]]
    sizes.sort()
    assert sum(sizes) / len(sizes) <= LIMITS["mean"]
    assert sizes[int(0.95 * len(sizes))] <= LIMITS["p95"]
    assert not large


@pytest.mark.parametrize("name", ROOMS)
def test_functions_are_short(name):
    for density in measure(ROOMS[name]):
        assert not [x for x in density.long_functions if x[0] > LIMITS["function"]]
        assert not [x for x in density.wide_functions if x[0] > LIMITS["parameters"]]
        assert not density.nested
        assert not density.unpacked


def test_code_fits_its_budget():
    """A feature that does not fit is too big, or it is in the wrong folder."""
    reading_path = sum(density.nodes for density in measure(CORE))
    rest = sum(density.nodes for density in measure(OPTIONS))
    print(f"\nnodes: reading path {reading_path:,}, the rest of rlhf/ {rest:,}")
    assert reading_path <= NODES["reading path"]
    assert rest <= NODES["the rest"]


def test_density_by_hand():
    """x = f(1): Assign, Name, Call, Name, Constant. return x: Return, Name. The def is one node and
    one for its parameter; docstring and annotations do not count."""
    source = 'def g(x: int) -> int:\n    """Why."""\n    x = f(1)\n    return x\n'
    density = Density(source, "g.py")
    assert sorted(density.sizes) == [2, 2, 5]
    assert density.nodes == 10  # and one for the module
    assert density.long_functions == [(2, "g.py:1")] and density.wide_functions == [(1, "g.py:1")]


def test_density_finds_packed_code():
    source = "a, b = (f(x) for x in y)\nc = [[x for x in row] for row in rows]\n"
    density = Density(source, "packed.py")
    assert density.unpacked == ["packed.py:1"] and density.nested == ["packed.py:2"]


# ---- pages ----


def test_pages_fit_their_budget():
    pages = files("README.md", "docs/*.md", "data/*/README.md")
    words = {path.name: len(text(path).split()) for path in pages}
    assert sum(words.values()) <= 18_000, words


def test_readme_has_at_most_a_thousand_words_of_prose():
    readme = re.sub(r"```.*?```", "", text(ROOT / "README.md"), flags=re.S)
    prose = re.sub(r"^ {4}.*$|^\|.*$", "", readme, flags=re.M)
    assert len(prose.split()) <= 1_000


def test_readme_names_files_flags_and_tests_that_exist():
    readme = text(ROOT / "README.md")
    for target in re.findall(r"(?:`|^    )make ([\w-]+)", readme, flags=re.M):
        assert re.search(rf"^{target}:", text(ROOT / "Makefile"), flags=re.M), f"make {target}"
    for path in re.findall(r"`((?:rlhf|data|tests|docs)/[\w./-]+|train_\w+\.py)`", readme):
        assert (ROOT / path).exists(), path
    code = "".join(map(text, [*CORE, *OPTIONS, *files("data/*/prepare.py")]))
    for flag in set(re.findall(r"`?--([a-z][a-z-]+)", readme)) - {"help"}:
        assert f"{flag.replace('-', '_')}:" in code or f'"--{flag}"' in code, f"--{flag}"
    tests = "".join(map(text, files("tests/**/test_*.py")))
    for name in re.findall(r"`(test_\w+)`", readme):
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("page", files("README.md", "docs/*.md", "data/*/README.md"), ids=str)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", text(page)):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_ci_runs_the_readmes_test_command():
    assert "make test" in text(ROOT / ".ci/run") and "make test" in text(ROOT / "README.md")


# ---- git ----

NO_GIT = pytest.mark.skipif(
    not (ROOT / ".git").exists() or not shutil.which("git"), reason="not a git clone"
)


def git(*arguments):
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@NO_GIT
def test_git_keeps_line_ends():
    """Git for Windows writes other line ends unless told not to, inside quoted cells too: other
    prompts."""
    answer = git("check-attr", "eol", "data/tiny_assistant/prompts.csv")
    assert answer.stdout.strip().endswith("eol: lf")


@NO_GIT
def test_git_ignores_no_source_file():
    """A file that .gitignore hides runs here and is absent from every clone."""
    answer = git("check-ignore", *map(str, SOURCES))
    assert (answer.returncode, answer.stdout) == (1, ""), answer.stdout + answer.stderr
