"""The promises around the code: five packages, pure maths files, README commands and flags that exist, file sizes."""

import ast
import re
import sys

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


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "make test" in (ROOT / "README.md").read_text()
