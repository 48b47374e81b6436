"""The promises around the code: five packages, pure maths files, README commands and flags that exist, file sizes."""

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize

import pytest

from tests.conftest import ROOT

SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("rlhf/**/*.py"), *ROOT.glob("data/**/*.py"), *ROOT.glob("tests/*.py")])


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module if (node.module or "").startswith("rlhf.") else (node.module or "").split(".")[0])


def test_five_packages_are_enough():
    allowed = {"torch", "numpy", "tiktoken", "pandas", "pytest", "tests", "judge", "train_reward", "train_ppo",
               "train_sft", *sys.stdlib_module_names}
    for path in SOURCES:
        optional = {"matplotlib"} if path.name == "study.py" else set()
        foreign = {name for name in imports(path) if not name.startswith("rlhf")} - allowed - optional
        assert not foreign, f"{path.name} imports {foreign}"


def test_maths_files_import_torch_and_each_other_alone():
    maths = {"masked", "losses", "rewards", "advantages"}
    for name in maths:
        assert set(imports(ROOT / "rlhf" / f"{name}.py")) <= {"torch", *(f"rlhf.{other}" for other in maths)}
    assert not [name for name in imports(ROOT / "rlhf" / "model.py") if name.startswith("rlhf")]


def test_nothing_in_the_package_imports_a_script():
    for path in ROOT.glob("rlhf/*.py"):
        assert not [name for name in imports(path) if name.startswith("train_")], path.name


def test_lines_are_at_most_120_columns():
    for path in SOURCES:
        if path.name == "mutants.py":  # its list quotes whole lines of the code
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert len(line) <= 120, f"{path.name}:{number}"


def test_readme_names_files_flags_and_tests_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^    )make (\w+)", readme, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), f"make {target}"
    for path in re.findall(r"`((?:rlhf|data|tests|docs)/[\w./-]+|train_\w+\.py)`", readme):
        assert (ROOT / path).exists(), path
    code = "".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("rlhf/*.py")])
    code += (ROOT / "data" / "tiny_assistant" / "prepare.py").read_text(encoding="utf-8")
    for flag in set(re.findall(r"`?--([a-z][a-z-]+)", readme)) - {"help"}:
        assert f"{flag.replace('-', '_')}:" in code or f'"--{flag}"' in code, f"--{flag}"
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", readme):
        assert f"def {name}(" in tests or (ROOT / "tests" / f"{name}.py").exists(), name


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


def test_the_core_is_as_large_as_the_readme_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table, rest = readme.split("## Reading order")[1].split("Options have files of their own")[0].rsplit("|\n", 1)
    stated = re.search(r"about ([\d,]+) code\s+lines.*?and\s+these\s+(\d+)", rest, flags=re.S).groups()
    for text, said in zip((table, rest), stated):
        names = sorted(set(re.findall(r"`((?:rlhf/|train_)\w+\.py)`", text)))
        sizes = {name: code_lines(ROOT / name) for name in names}
        print(f"\n{sum(sizes.values()):,} code lines: {', '.join(f'{name} {size}' for name, size in sizes.items())}")
        assert abs(sum(sizes.values()) - int(said.replace(",", ""))) <= 25


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
