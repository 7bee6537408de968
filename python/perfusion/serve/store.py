"""`Store`: files by the SHA-256 of their content, in a folder or any file system that fsspec knows."""

from __future__ import annotations

import hashlib
import re
import uuid
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from perfusion.files import write_bytes

__all__ = ["DamagedFile", "Store"]

_DIGEST = re.compile(r"[0-9a-f]{64}")


class DamagedFile(Exception):
    """A file that was kept is gone, or holds something else than what was kept."""


class Store:
    """url: a folder, or what fsspec calls a URL ("s3://bucket/concepts", "memory://concepts").

    No name ever comes from a client: a file's name is its digest.
    """

    def __init__(self, url: str):
        self.url = url
        self._files, self._root = fsspec.core.url_to_fs(url)

    def _path(self, digest: str) -> str:
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"a digest must be 64 hexadecimal digits, got {digest!r}")
        return f"{self._root.rstrip('/')}/{digest[:2]}/{digest}.safetensors"

    @staticmethod
    def digest(data: bytes) -> str:
        """The name of a file with this content."""
        return hashlib.sha256(data).hexdigest()

    def put(self, data: bytes) -> str:
        """Keep a file, in full or not at all; returns its digest. OSError where it cannot be kept."""
        digest = self.digest(data)
        path = self._path(digest)
        try:
            if self.get(digest) == data:
                return digest
        except DamagedFile:
            pass
        if isinstance(self._files, LocalFileSystem):
            write_bytes(Path(path), data)
        else:
            draft = f"{path}.{uuid.uuid4().hex}"
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(draft, data)
            self._files.mv(draft, path)
        return digest

    def get(self, digest: str) -> bytes:
        """The file with this digest, checked. DamagedFile."""
        try:
            data = self._files.cat_file(self._path(digest))
        except OSError as error:
            raise DamagedFile(f"its file cannot be read ({type(error).__name__}); upload it again") from error
        if self.digest(data) != digest:
            raise DamagedFile("its file is damaged; upload it again")
        return data

    def digests(self) -> list[str]:
        """Of all files."""
        names = (str(path).rpartition("/")[2].removesuffix(".safetensors") for path in self._files.find(self._root))
        return [name for name in names if _DIGEST.fullmatch(name)]

    def remove(self, digest: str) -> None:
        """Forget a file. Nothing happens where there is none."""
        try:
            self._files.rm_file(self._path(digest))
        except OSError:
            pass
