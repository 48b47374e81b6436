"""rlhf.tools.export: the folder has the logits of the checkpoint."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.networks.gpt2 import load_gpt2
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.run.loading import load_policy
from rlhf.run.program import lock
from rlhf.tools import export

TOKENS = torch.randint(800, (3, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_export_writes_the_weights_of_a_checkpoint(trained, tmp_path, capsys, name):
    _, runs, _ = trained
    path = runs / f"{name}.pt"
    export.main(parse_cli(export.ExportConfig, ["--checkpoint", str(path), "--out", str(tmp_path)]))
    gpt, _ = load_policy(path, name)
    assert torch.equal(load_gpt2(str(tmp_path))(TOKENS), gpt(TOKENS))
    parameters = sum(parameter.numel() for parameter in gpt.parameters())
    assert f"pytorch_model.bin: {parameters:,} parameters" in capsys.readouterr().out


def exported(runs, *flags):
    export.main(parse_cli(export.ExportConfig, ["--checkpoint", str(runs / "sft.pt"), *flags]))


def test_export_does_not_replace_a_folder_without_being_asked(trained, tmp_path):
    """An earlier export, or a folder of anything else."""
    _, runs, _ = trained
    (tmp_path / "config.json").write_text("of another model")
    out = ["--out", str(tmp_path)]
    with pytest.raises(InputError, match="is not empty; give another folder, or --overwrite"):
        exported(runs, *out)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of another model"]
    exported(runs, *out, "--overwrite")
    gpt, _ = load_policy(runs / "sft.pt", "sft")
    assert torch.equal(load_gpt2(str(tmp_path))(TOKENS), gpt(TOKENS))


def test_export_takes_the_lock_of_a_folder_that_a_run_has_written_to(tmp_path):
    cfg = export.ExportConfig(out=str(tmp_path))
    assert cfg.lock_file() is None
    with lock(tmp_path / ".lock"):
        assert cfg.lock_file() == tmp_path / ".lock"


def test_export_rejects_a_model_of_transformers(monkeypatch, tmp_path):
    checkpoint = {"model_config": {"init": "gemma"}}
    monkeypatch.setattr(export, "load_policy", lambda *_: (None, checkpoint))
    with pytest.raises(InputError, match="ppo.pt is no GPT-2: this program writes GPT-2's format"):
        export.main(SimpleNamespace(checkpoint=Path("ppo.pt"), out=tmp_path, data=""))
