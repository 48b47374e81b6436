"""Fetching public files, for the data sets' prepare.py."""

import hashlib
from pathlib import Path

from torch.hub import download_url_to_file

from rlhf.run.errors import InputError


def check_sha256(path: Path, sha256: str) -> None:
    """Raise InputError if a file is not the one that it should be."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise InputError(
            f"{path} is not the expected file: its SHA-256 is {found[:16]}... and should be "
            f"{sha256[:16]}...; remove it and fetch it again"
        )


def fetch(url: str, folder: Path, sha256: str | None = None) -> Path:
    """The file at url, in `folder` under its own name; fetched unless it is there, with a progress
    bar.

    It gets its name when it is complete and its checksum is right. Raises InputError offline, or if
    it is not the file that sha256 names.
    """
    path = folder / url.rsplit("/", 1)[-1]
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"fetching {url}", flush=True)
        try:
            download_url_to_file(url, str(path), hash_prefix=sha256)
        except Exception as error:  # no network, no such page, a line that broke, a full disk, ...
            reason = f"{type(error).__name__}: {error}"
            raise InputError(
                f"could not fetch {url} ({reason}); with a copy from elsewhere put it at {path}"
            ) from error
    if sha256 is not None:
        check_sha256(path, sha256)
    return path
