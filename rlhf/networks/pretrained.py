"""What transformers loads: models, tokenizers, settings. The packages are extras."""

import contextlib
import importlib
from pathlib import Path

from rlhf.run.errors import InputError


def package(name: str):
    """The imported package. Raises InputError if the extra is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this needs the package {name}: pip install .[hf] ({error})") from error


@contextlib.contextmanager
def loading(init: str):
    """Raise InputError if the model cannot be loaded, for whatever reason: no such folder, no
    connection, a damaged file, ..."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = str(error).partition("\n")[0]  # torch adds pages
        if "trust_remote_code" in str(error):
            text = "it needs Python code that comes with the model (auto_map), which is never run"
        raise InputError(
            f"--init {init} cannot be loaded: {type(error).__name__}: {text}; give a model of "
            f"transformers: a model's folder with all its files, a GGUF file, or a name on the "
            f"Hugging Face hub and an internet connection"
        ) from error


def from_pretrained(kind: str, init: str, **options):
    """transformers.KIND.from_pretrained(init), without running code that comes with the model.

    Raises InputError if that fails.
    """
    where = init
    if init.endswith(".gguf"):
        where = Path(init).parent
        options["gguf_file"] = Path(init).name
    load = getattr(package("transformers"), kind).from_pretrained
    with loading(init):
        return load(where, trust_remote_code=False, **options)


def local_files(init: str) -> dict[str, Path]:
    """{"init NAME": path} of the files of a model that lies in a folder or in a file."""
    files = [Path(init), *sorted(Path(init).glob("*.[bjs]*"))]
    return {f"init {file.name}": file for file in files if file.is_file()}
