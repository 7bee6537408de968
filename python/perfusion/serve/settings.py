"""`Settings`: every limit and place of a server, with its default."""

from __future__ import annotations

import dataclasses
import ipaddress
from pathlib import Path

from perfusion.files import user_path

__all__ = ["SCOPES", "Settings"]

SCOPES = ("draw", "upload", "train", "admin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server is set up. ValueError says what breaks which rule.

    models: name in the API -> what `load_pipeline` takes; the first is the default. folder: what must survive: the database, concepts,
    jobs. database: SQLAlchemy's URL, by default SQLite in `folder`. store: a folder or an fsspec URL for concept files, by default
    in `folder`. devices: one worker each; () is CUDA where there is one, else the CPU. dtype: as torch calls it.
    rows: pictures in one forward at most. capacity: concepts loaded at once, per model and device; a concept more takes the place
    of the one that was not used for longest. queue: pictures that wait; more are refused. queue_per_key: of one key.
    timeout: seconds until a picture that is not drawn is given up. stall: seconds without a sign after which a worker is
    replaced. grace: seconds for what is being drawn when the server ends.
    body: largest request in bytes. pixels: of a picture that is drawn, or sent. concepts: quota of a key that has none of its own.
    train: whether training jobs are taken. origins: sites whose pages may call (CORS). hosts: names that this server answers
    to, beside loopback's. metrics_key: for /metrics, None for open. log_prompts: write prompts into the log.
    split_by_concept: never two concepts in one forward, as other engines do; there to compare.
    """

    models: dict[str, str] = dataclasses.field(default_factory=lambda: {"toybox": "toybox"})
    folder: Path = Path("perfusion-server")
    database: str | None = None
    store: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    devices: tuple[str, ...] = ()
    dtype: str | None = None
    rows: int = 8
    capacity: int = 64
    queue: int = 1024
    queue_per_key: int = 1024
    timeout: float = 300.0
    stall: float = 300.0
    grace: float = 30.0
    body: int = 32 * 2**20
    pixels: int = 2048 * 2048
    most_steps: int = 150
    concepts: int = 10_000
    jobs: int = 16
    train: bool = True
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    metrics_key: str | None = None
    log_prompts: bool = False
    split_by_concept: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", user_path(self.folder))
        if not self.models:
            raise ValueError("serve: there must be a model; give one with --model")
        for name in self.models:
            if not name or ":" in name or "/" in name or not name.isprintable():
                raise ValueError(f"serve: a model's name must be printable and without : and /, got {name!r}. Give --model NAME=MODEL.")
        for field in ("rows", "capacity", "queue", "queue_per_key", "body", "pixels", "most_steps", "jobs"):
            if getattr(self, field) < 1:
                raise ValueError(f"serve: {field} must be at least 1, got {getattr(self, field)}")
        for field in ("timeout", "stall", "grace"):
            if not getattr(self, field) > 0:
                raise ValueError(f"serve: {field} must be a positive number of seconds, got {getattr(self, field)}")
        most = 8 * (2 * self.rows + 1)  # that rows under schedules can hold at once
        object.__setattr__(self, "capacity", max(self.capacity, most))

    @property
    def loopback(self) -> bool:
        """Whether only this computer reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.folder.absolute() / 'state.sqlite'}"

    @property
    def store_url(self) -> str:
        return self.store or str(self.folder.absolute() / "concepts")

    @property
    def jobs_folder(self) -> Path:
        return self.folder.absolute() / "jobs"
