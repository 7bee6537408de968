"""Models and concepts by their id on the Hugging Face hub: fetched because they were named, and told of beforehand.

    model_folder("user/model@main")     concept_file("user/concept")     push("concepts/teddy", "user/teddy")

The cache, tokens, HF_ENDPOINT and the offline mode (HF_HUB_OFFLINE=1) are huggingface_hub's own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from perfusion.files import size_text, user_path

__all__ = ["HubError", "concept_file", "configurations", "hub_id", "model_path", "push"]

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<file>[\w./ -]+\.safetensors))?(?:@(?P<revision>[\w./-]+))?")
_STEMS = r"(?:diffusion_pytorch_model|model|pytorch_model)"
_WEIGHTS = re.compile(rf"{_STEMS}(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.(?P<kind>safetensors|bin)")
_INDEX = re.compile(r"\w+\.(?P<kind>safetensors|bin)\.index(?:\.(?P<variant>\w+))?\.json")
_PLAIN = (".json", ".txt", ".model")


class HubError(ValueError):
    """What was named cannot be fetched. The message says what was looked for, and what to do."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a .safetensors file on the hub says of itself: name -> shape of every tensor, its metadata, and its size in bytes."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    size: int


def hub_id(text: Any) -> tuple[str, str | None, str | None] | None:
    """(repository, file, revision) of `user/name`, `user/name@revision` or `user/name/file.safetensors`; None for paths and other text."""
    if not isinstance(text, str) or text.endswith((".ckpt", ".bin", ".pt")):
        return None
    if os.path.exists(os.path.expanduser(text)) or os.path.isdir(text.split("/")[0]):  # a path, or one that is mistyped: no network for it
        return None
    found = _ID.fullmatch(text)
    if found is None or (found["file"] is None and found["repo"].endswith(".safetensors")):
        return None
    return found["repo"], found["file"], found["revision"]


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _of_the_network(error: Exception) -> bool:
    """Whether it is an error of the connection or of the hub, whichever library speaks HTTP for huggingface_hub."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0].startswith(("http", "requests", "huggingface_hub"))


def _info(repo: str, revision: str | None) -> Any:
    """The repository's files and their sizes; None offline, or where the hub cannot be reached: then the cache has to do."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if _offline():
        return None
    try:
        return HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(repo, revision=revision, files_metadata=True)
    except RevisionNotFoundError as error:
        raise HubError(f"{repo!r} has no revision {revision!r} on the hub.") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo!r} is neither a file or folder here nor a repository on the hub that can be read. Check the spelling; for a private "
            "one, log in with `hf auth login`."
        ) from error
    except Exception as error:
        if not _of_the_network(error):
            raise
        _tell(f"{repo}: the hub cannot be reached ({str(error).splitlines()[0]}); looking into the cache.")
        return None


def _fetch(repo: str, info: Any, revision: str | None, files: list[str], tell: Callable[[str], None]) -> Path:
    """Download what the cache has not; where the files are."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings}
    missing = [name for name in files if not isinstance(try_to_load_from_cache(repo, name, revision=info.sha), str)]
    if missing:
        total, rest = sum(sizes[name] for name in files), sum(sizes[name] for name in missing)
        cached = "" if rest == total else f" of {size_text(total)}, the rest is in the cache"
        count = f"{len(missing)} file{'' if len(missing) == 1 else 's'}"
        tell(f"{repo}: fetching {count}, {size_text(rest)}{cached} (revision {info.sha[:7]}).")
    folder = None
    for name in files:
        try:
            path = Path(hf_hub_download(repo, name, revision=revision, endpoint=os.environ.get("HF_ENDPOINT")))
        except Exception as error:
            if not _of_the_network(error):
                raise
            why = str(error).splitlines()[0]
            raise HubError(f"{repo}/{name} could not be fetched: {why} What is in the cache by now is kept.") from error
        folder = path.parents[name.count("/")]
    return folder


def _cached(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        why = "offline mode is on (HF_HUB_OFFLINE)" if _offline() else "the hub cannot be reached"
        raise HubError(f"{repo!r} is not in the cache, and {why}. Fetch it once with a connection, or give a path.") from error


def model_path(text: str, *, half: bool = False, tell: Callable[[str], None] = _tell) -> Path:
    """The folder, or the checkpoint file, of a model that a hub id names; downloads what the cache has not, after saying how much.

    half: prefer weights in 16 bits where the repository has them. HubError when it cannot be had.
    """
    repo, file, revision = hub_id(text) or _no_id(text)
    info = _info(repo, revision)
    if info is None:
        folder = _cached(repo, revision)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return folder if file is None and "model_index.json" in names else folder / _single(repo, names, file)
    names = [sibling.rfilename for sibling in info.siblings]
    if file is None and "model_index.json" in names:
        folder = _fetch(repo, info, revision, ["model_index.json"], lambda _: None)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return _fetch(repo, info, revision, pipeline_files(names, index, half), tell)
    name = _single(repo, names, file)
    return _fetch(repo, info, revision, [name], tell) / name


def configurations(text: str, *, tell: Callable[[str], None] = _tell) -> tuple[Path | Header, int | None]:
    """What says what a model is, fetched without its weights: the folder of its configurations, or a checkpoint file's header.

    Beside it is how large the whole is; None where everything lies in the cache. HubError when it cannot be had.
    """
    from huggingface_hub import try_to_load_from_cache

    repo, file, revision = hub_id(text) or _no_id(text)
    info = _info(repo, revision)
    if info is None:
        return model_path(text, tell=tell), None
    names, sizes = [sibling.rfilename for sibling in info.siblings], {sibling.rfilename: sibling.size or 0 for sibling in info.siblings}
    if file is not None or "model_index.json" not in names:
        name = _single(repo, names, file)
        cached = try_to_load_from_cache(repo, name, revision=info.sha)
        if isinstance(cached, str):
            return Path(cached), None
        header = _header(repo, name, info.sha, sizes[name])
        return header, header.size
    folder = _fetch(repo, info, revision, ["model_index.json"], lambda _: None)
    files = pipeline_files(names, json.loads((folder / "model_index.json").read_text(encoding="utf-8")), half=False)
    weights = [name for name in files if _weights(name) is not None and not name.endswith(".json")]
    return _fetch(repo, info, revision, [name for name in files if name not in weights], tell), sum(sizes[name] for name in weights)


def _header(repo: str, name: str, revision: str, size: int) -> Header:
    """Its first bytes alone are asked for."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        found = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).parse_safetensors_file_metadata(repo, name, revision=revision)
        shapes = {key: tuple(tensor.shape) for key, tensor in found.tensors.items()}
    except (SafetensorsParsingError, KeyError, ValueError, AttributeError, TypeError) as error:  # a stranger's file may hold any JSON
        raise HubError(f"{repo}/{name} cannot be read as a .safetensors file: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if not _of_the_network(error):
            raise
        raise HubError(f"the header of {repo}/{name} could not be fetched: {str(error).splitlines()[0]}") from error
    return Header(f"{repo}/{name}", shapes, found.metadata or {}, size)


def _no_id(text: str) -> Any:
    raise HubError(f"{text!r} is no hub id; one is written user/name, user/name@revision or user/name/file.safetensors.")


def pipeline_files(names: Iterable[str], index: Mapping[str, Any], half: bool) -> list[str]:
    """What a pipeline needs of a repository: configurations, and of the weights one kind, safetensors before pickles."""
    names = list(names)
    parts = [part for part, value in index.items() if isinstance(value, list) and value[0] is not None and part != "safety_checker"]
    files = ["model_index.json"]
    for part in parts:
        inside = [name for name in names if name.startswith(f"{part}/") and name.count("/") == 1]
        weights = {name: found for name in inside if (found := _weights(name)) is not None}
        files += [name for name in inside if name not in weights and name.endswith(_PLAIN)]
        kinds = {found for found in weights.values()}
        order = sorted(kinds, key=lambda kind: (kind[0] != "safetensors", kind[1] not in (("fp16", None) if half else (None, "fp16")),
                                                kind[1] != ("fp16" if half else None), kind[1] or ""))  # fmt: skip
        files += [name for name, kind in weights.items() if order and kind == order[0]]
    return files


def _weights(name: str) -> tuple[str, str | None] | None:
    """(kind, variant) of a file of weights or of their index; None for other files."""
    base = name.rsplit("/", 1)[-1]
    found = _WEIGHTS.fullmatch(base) or _INDEX.fullmatch(base)
    return None if found is None else (found["kind"], found["variant"])


def _single(repo: str, names: list[str], file: str | None) -> str:
    """The one .safetensors file that is meant."""
    if file is not None:
        if file not in names:
            raise HubError(f"{repo!r} has no file {file!r}.")
        return file
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if len(found) != 1:
        if not found:
            raise HubError(f"{repo!r} has no .safetensors file and no model_index.json.")
        raise HubError(f"{repo!r} has several files: {', '.join(found[:8])}. Name one, as {repo}/{found[0]}.")
    return found[0]


def concept_file(text: str, revision: str | None = None, *, tell: Callable[[str], None] = _tell) -> Path:
    """The concept file of a hub id, `user/concept`. HubError when it cannot be had."""
    repo, file, at = hub_id(text) or _no_id(text)
    revision = revision or at
    info = _info(repo, revision)
    if info is None:
        folder = _cached(repo, revision)
        return folder / _single(repo, [path.name for path in folder.iterdir()], file)
    name = _single(repo, [sibling.rfilename for sibling in info.siblings], file)
    return _fetch(repo, info, revision, [name], tell) / name


def push(source: str | Path, repo: str, *, private: bool = False, references: bool = False, message: str | None = None) -> str:
    """Upload a concept, its card and its gallery to `user/name` on the hub; returns the address.

    source: the folder that training wrote, or a concept file. references: also upload the pictures that it was learned from,
    which are kept back otherwise, as are config.yaml and the log, which name files of this computer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from perfusion.concept import Concept

    if hub_id(repo) is None or _ID.fullmatch(repo)["file"] or _ID.fullmatch(repo)["revision"]:
        raise HubError(f"{repo!r} is no name of a repository; one is written user/name.")
    source = user_path(source)
    file = source if source.is_file() else _concept_in(source)
    concept = Concept.load(file)  # nothing else is uploaded under this name
    operations = [CommitOperationAdd(file.name, str(file))]
    card = file.parent / "README.md"
    if source.is_dir() and card.is_file():
        beside = [name for name in ("gallery.png", *(["references.png"] if references else [])) if (file.parent / name).is_file()]
        text = _card(card.read_text(encoding="utf-8"), {file.name, *beside}, repo)
        operations += [CommitOperationAdd("README.md", text.encode()), *(CommitOperationAdd(n, str(file.parent / n)) for n in beside)]
    if _offline():
        raise HubError("nothing can be uploaded: offline mode is on (HF_HUB_OFFLINE).")
    try:
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message=message or f"The concept <{concept.name}>")
    except Exception as error:
        if not _of_the_network(error):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = "Check the connection." if status is None else "Log in with `hf auth login` first."
        raise HubError(f"{repo!r} could not be written: {str(error).splitlines()[0].rstrip('.')}. {advice}") from error
    return str(url)


def _concept_in(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if len(found) != 1:
        raise HubError(f"{str(folder)!r} holds {len(found) or 'no'} concept file{'s' if len(found) > 1 else ''}; give the file itself.")
    return found[0]


def _card(text: str, there: set[str], repo: str) -> str:
    """The card without links to files that are kept back, and with a line that loads it from the hub."""
    lines = []
    for line in text.splitlines():
        links = re.findall(r"\]\(([\w.-]+)\)", line)
        if any(link not in there for link in links):
            continue
        lines.append(re.sub(r'handle\.load\("[^"]*"\)', f'handle.load("{repo}")', line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"
