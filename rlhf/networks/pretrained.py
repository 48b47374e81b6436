"""What transformers loads: models, tokenizers, settings. The packages are extras."""

import importlib
from pathlib import Path

from rlhf.run.errors import InputError


def package(name: str):
    """The imported package. Raises InputError if the extra is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this needs the package {name}: pip install .[hf] ({error})") from error


def from_pretrained(kind: str, init: str, **options):
    """transformers.KIND.from_pretrained(init), without running code that comes with the model.

    Raises InputError if that fails.
    """
    where = init
    if init.endswith(".gguf"):
        where = Path(init).parent
        options["gguf_file"] = Path(init).name
    load = getattr(package("transformers"), kind).from_pretrained
    try:
        return load(where, trust_remote_code=False, **options)
    except Exception as error:  # no such folder, no connection, a damaged file, ...
        if "trust_remote_code" in str(error):
            raise InputError(
                f"--init {init} needs Python code that comes with the model (auto_map), which is "
                f"never run; give a model whose class is part of transformers"
            ) from None
        raise InputError(
            f"--init {init} cannot be loaded: {type(error).__name__}: {error}; give a model's "
            f"folder, a GGUF file, or a name on the Hugging Face hub and an internet connection"
        ) from error


def local_files(init: str) -> dict[str, Path]:
    """{"init NAME": path} of the files of a model that lies in a folder or in a file."""
    files = [Path(init), *sorted(Path(init).glob("*.[bjs]*"))]
    return {f"init {file.name}": file for file in files if file.is_file()}
