"""The wheel: built, unpacked, and used in an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.helpers import ROOT, rows

pytestmark = pytest.mark.slow
FLAGS = {
    "sft": "--eval-rows 20",
    "reward": "--eval-rows 20",
    "ppo": "--eval-prompts 4 --max-new-tokens 4",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's contents in a folder. It is built from a copy, since a build leaves files in the
    repository and takes in what an older one has left."""
    pytest.importorskip("setuptools", minversion="70.1")  # older ones need the package wheel
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for name in ("rlhf", "data", "docs", "tests"):
        shutil.copytree(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-index", "-w", folder, source], check=True, capture_output=True)
    [file] = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def rlhf(wheel, folder, *words):
    """What the command `rlhf` of the installed wheel does, started in a folder."""
    [entry_points] = wheel.glob("*.dist-info/entry_points.txt")
    assert "rlhf = rlhf.run.commands:main" in entry_points.read_text()
    command = [sys.executable, "-c", "from rlhf.run.commands import main; main()", *words]
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_three_stages_run_from_the_wheel_in_an_empty_folder(wheel, tmp_path):
    """With the bundled data set. Each prints the command of the next one."""
    following = {"sft": "rlhf reward", "reward": "rlhf ppo"}
    following["ppo"] = "rlhf export --checkpoint runs/ppo.pt"
    for name, flags in FLAGS.items():
        done = rlhf(wheel, tmp_path, name, "--device", "cpu", "--steps", "2", *flags.split())
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"next: {following[name]}"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [len(rows(tmp_path / f"runs/{name}.csv")) for name in FLAGS] == [2, 2, 2]
    done = rlhf(wheel, tmp_path, "sample", "--device", "cpu", "--prompt", "It is about my money.")
    assert done.returncode == 0 and "gold" in done.stdout, done.stderr


def test_wheel_holds_the_code_and_the_bundled_data_set(wheel):
    expected = [*ROOT.glob("*.py"), *ROOT.glob("rlhf/**/*.py"), *ROOT.glob("data/*.py")]
    bundled = [f"data/tiny_assistant/{name}" for name in ("*.csv", "*.tiktoken", "judge.py")]
    for pattern in (*bundled, "data/*.html", "rlhf/tools/*.html"):
        found = list(ROOT.glob(pattern))
        assert found
        expected += found
    for path in expected:
        copy = wheel / path.relative_to(ROOT)
        assert copy.is_file() and copy.read_bytes() == path.read_bytes(), path
    names = {path.name for path in wheel.iterdir() if path.suffix not in (".py", ".dist-info")}
    assert names == {"data", "rlhf"}  # neither tests nor docs
