"""Promises about the repository: five packages, the layout, README commands and flags that exist, code size."""

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize

import pytest

from tests.helpers import ROOT

SOURCES = sorted(path for pattern in ("*.py", "rlhf/**/*.py", "data/**/*.py", "tests/**/*.py")
                 for path in ROOT.glob(pattern))


def imports(path):
    """The modules that a file imports; of `from rlhf.support import cli` that is rlhf.support.cli."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = ROOT / f"{node.module}.{alias.name}".replace(".", "/")
                yield f"{node.module}.{alias.name}" if module.with_suffix(".py").is_file() else node.module


OPTIONAL = {"rlhf/tools/study.py": {"matplotlib"}, "rlhf/tools/plot.py": {"matplotlib"},
            "tests/tools/test_plot.py": {"tensorboard"}, "rlhf/tools/trl_ppo.py": {"transformers", "trl"}}


def wing(module):
    """"rlhf.support.cli" -> "support"; "rlhf.data" -> "core"; "train_ppo" -> "script"; "torch" -> None."""
    parts = module.split(".")
    if parts[0] in ("train_sft", "train_reward", "train_ppo"):
        return "script"
    if parts[0] != "rlhf":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ("support", "extras", "tools") else "core"


def test_code_needs_only_five_packages():
    allowed = {"torch", "numpy", "tiktoken", "pandas", "pytest", "tests", "judge", "data", *sys.stdlib_module_names}
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        used = {module.split(".")[0] for module in imports(path) if wing(module) is None}
        assert used <= allowed | OPTIONAL.get(name, set()), name


def test_maths_files_import_only_torch_and_each_other():
    maths = {"masked", "losses", "rewards", "advantages"}
    for name in maths:
        assert set(imports(ROOT / "rlhf" / f"{name}.py")) <= {"torch", *(f"rlhf.{other}" for other in maths)} | {
            "torch.nn.functional"}
    assert not [name for name in imports(ROOT / "rlhf" / "model.py") if name.startswith("rlhf")]


MAY_IMPORT = {"core": {"core", "support"}, "support": {"core", "support"}, "extras": {"core", "support", "extras"},
              "tools": {"core", "support", "extras", "tools"}}
LOADED_BY_SUPPORT = {"rlhf.model", "rlhf.tokenizer"}  # what checkpoints are made of


def test_imports_follow_the_layout():
    """Core imports core and support; support only model and tokenizer of the core; nothing imports a script."""
    for path in ROOT.glob("rlhf/**/*.py"):
        here = path.parent.name if path.parent.name in MAY_IMPORT else "core"
        for module in imports(path):
            there = wing(module)
            assert there is None or there in MAY_IMPORT[here], f"{path} imports {module}"
            assert (here, there) != ("support", "core") or module in LOADED_BY_SUPPORT, f"{path} imports {module}"


def test_imports_have_no_circle():
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("rlhf/**/*.py")}
    left = {name: {module for module in imports(path) if module in files} for name, path in files.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_train_ppo_is_short_before_the_algorithm():
    """At most 30 imported names, and the loop starts before line 180."""
    tree = ast.parse((ROOT / "train_ppo.py").read_text(encoding="utf-8"))
    names = [alias for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    loop = next(node for node in ast.walk(tree) if isinstance(node, ast.For) and ast.unparse(node.target) == "step")
    assert len(names) <= 30, f"train_ppo.py imports {len(names)} names, at most 30"
    assert loop.lineno < 180, f"the loop of train_ppo.py starts in line {loop.lineno}"


def test_lines_are_at_most_120_columns():
    sources = [path for path in SOURCES if path.name != "mutants.py"]  # its list quotes whole lines of the code
    lines = {(path.name, number): len(line) for path in sources
             for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)}
    assert not [place for place, length in lines.items() if length > 120]


def test_readme_names_files_flags_and_tests_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^    )make (\w+)", readme, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), f"make {target}"
    for path in re.findall(r"`((?:rlhf|data|tests|docs)/[\w./-]+|train_\w+\.py)`", readme):
        assert (ROOT / path).exists(), path
    code = "".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("rlhf/**/*.py")])
    code += (ROOT / "data" / "tiny_assistant" / "prepare.py").read_text(encoding="utf-8")
    for flag in set(re.findall(r"`?--([a-z][a-z-]+)", readme)) - {"help"}:
        assert f"{flag.replace('-', '_')}:" in code or f'"--{flag}"' in code, f"--{flag}"
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("**/test_*.py"))
    for name in re.findall(r"`(test_\w+)`", readme):
        assert f"def {name}(" in tests, name


LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def code_lines(path):
    """Lines that hold code: no comments, no docstrings, no blank lines."""
    source = path.read_text(encoding="utf-8")
    spans = [(token.start[0], token.end[0]) for token in tokenize.generate_tokens(io.StringIO(source).readline)
             if token.type not in LAYOUT]
    docstrings = [(node.body[0].lineno, node.body[0].end_lineno) for node in ast.walk(ast.parse(source))
                  if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None]
    lines, left_out = ({line for first, last in some for line in range(first, last + 1)}
                       for some in (spans, docstrings))
    return len(lines - left_out)


def test_code_lines_by_hand(tmp_path):
    """Four: the import, the def, and a return over two lines."""
    path = tmp_path / "example.py"
    path.write_text('"""Two\nlines."""\n\nimport math  # why\n\n\ndef f():\n    """What."""\n    # a comment\n'
                    "    return (math.pi +\n            1)\n")
    assert code_lines(path) == 4


BUDGETS = {"reading path": 1000, "support": 450, "extras": 700, "tools": 950}


def test_code_fits_its_budget():
    """The reading path is the core's files and the three scripts. A feature that does not fit is too big, or it is in
    the wrong folder."""
    sizes = {name: {} for name in BUDGETS}
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("rlhf/**/*.py")]):
        folder = path.parent.name if path.parent.name in BUDGETS else "reading path"
        sizes[folder][path.stem] = code_lines(path)
    for folder, files in sizes.items():
        print(f"\n{folder}: {sum(files.values())} of {BUDGETS[folder]} code lines "
              f"({', '.join(f'{name} {size}' for name, size in files.items() if size)})")
    for folder, files in sizes.items():
        assert (size := sum(files.values())) <= BUDGETS[folder], f"{folder}: {size} of {BUDGETS[folder]} code lines"


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "make test" in (ROOT / "README.md").read_text()


NO_GIT = pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="not a git clone")


@NO_GIT
def test_git_keeps_line_ends():
    """Git for Windows writes other line ends unless told not to, inside quoted cells too: other prompts."""
    command = ["git", "-c", "safe.directory=*", "check-attr", "eol", "data/tiny_assistant/prompts.csv"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip().endswith("eol: lf")


@NO_GIT
def test_git_ignores_no_source_file():
    """A file that .gitignore hides runs here and is absent from every clone."""
    command = ["git", "-c", "safe.directory=*", "check-ignore", *map(str, SOURCES)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (1, ""), answer.stdout + answer.stderr
