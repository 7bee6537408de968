"""`perfusion serve`: the server."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from perfusion.cli.models import Precision

NEEDED = "the server needs packages that are not installed ({missing}): pip install 'perfusion-kernels[serve]'"


def serve(
    model: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="MODEL", help="As `perfusion generate --model`; NAME=MODEL for its name in the API. May be repeated. [default: toybox]"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; other than this computer's own needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 8000,
    folder: Annotated[Optional[Path], typer.Option(help="What must survive. [default: in your data folder]", show_default=False)] = None,
    database: Annotated[
        Optional[str],
        typer.Option(metavar="URL", help="postgresql://USER:PASSWORD@HOST/NAME [default: SQLite in the folder]", show_default=False),
    ] = None,
    store: Annotated[
        Optional[str],
        typer.Option(metavar="URL", help="Folder or fsspec URL for concept files. [default: in the folder]", show_default=False),
    ] = None,
    device: Annotated[
        Optional[list[str]], typer.Option(help="cpu, cuda:0, cuda:1: a worker on each. May be repeated. [default: CUDA where there is one]")
    ] = None,
    dtype: Annotated[Optional[Precision], typer.Option(help="By default float32 on a CPU and float16 elsewhere.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Pictures in one forward of the model at most.")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="Pictures that wait at most; more are refused.")] = 1024,
    queue_per_key: Annotated[int, typer.Option(min=1, help="Of one key.")] = 1024,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a picture is given up.")] = 300.0,
    grace: Annotated[float, typer.Option(min=0.1, help="Seconds for what is being drawn when the server is told to end.")] = 30.0,
    most_pixels: Annotated[int, typer.Option(min=64, help="Of a picture.")] = 2048 * 2048,
    most_bytes: Annotated[int, typer.Option(min=1024, help="Of a request.")] = 32 * 2**20,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Take training jobs.")] = True,
    origin: Annotated[Optional[list[str]], typer.Option(metavar="SITE", help="A site whose pages may call. May be repeated.")] = None,
    allow_host: Annotated[Optional[list[str]], typer.Option(metavar="NAME", help="A host name to answer to. May be repeated.")] = None,
    metrics_key: Annotated[
        Optional[str], typer.Option(help="Key of /metrics, which is open otherwise.", envvar="PERFUSION_METRICS_KEY")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Draw on replicas of a Ray Serve deployment.")] = False,
    ray_address: Annotated[
        Optional[str],
        typer.Option(metavar="ADDRESS", help="The Ray cluster. [default: RAY_ADDRESS, or one on this machine]", show_default=False),
    ] = None,
    replicas: Annotated[str, typer.Option(metavar="LEAST:MOST", help="With --ray: how many, by the drawings under way.")] = "1:1",
    replica_gpus: Annotated[float, typer.Option(min=0, help="With --ray: GPUs of a replica; 0 draws on a CPU.")] = 0.0,
    check: Annotated[bool, typer.Option("--check", help="Start, draw a first picture with every model, and end.")] = False,
) -> None:
    """Serve pictures over HTTP: OpenAI's images API, concepts of many users in one batch, uploads, training jobs.

    On this computer's own address whoever reaches the server may use it, until `perfusion keys` has made a key; other addresses
    need one. Ctrl-C finishes what is being drawn. Concepts, keys and jobs are in the folder, and a job that was running goes on at
    the next start. docs/server.md has the API.

    Exit codes: 0 done, 2 bad input, or packages that are missing.
    """
    require()
    from perfusion.serve import Settings, running
    from perfusion.serve import serve as run
    from perfusion.serve.logs import set_up_logs

    settings = Settings(
        models=named_models(model), folder=folder or data_folder(), database=database, store=store, host=host, port=port,
        devices=tuple(device or ()), dtype=None if dtype is None else dtype.value, rows=rows, queue=queue, queue_per_key=queue_per_key,
        timeout=timeout, grace=grace, pixels=most_pixels, body=most_bytes, train=train, origins=tuple(origin or ()),
        hosts=tuple(allow_host or ()),
        metrics_key=metrics_key, log_prompts=log_prompts,
    )  # fmt: skip
    parts = {"pool": on_ray(settings, ray_address, replicas, replica_gpus)} if ray else {}
    if check:
        with running(settings, **parts) as url:
            print(f"{url} is ready: {', '.join(settings.models)}")
        return
    set_up_logs()
    print(f"perfusion serves {', '.join(settings.models)} on http://{host}:{port}; state in {settings.folder}", file=sys.stderr)
    run(settings, **parts)


def require() -> None:
    """ValueError where the extra is not installed."""
    from importlib.util import find_spec

    wanted = {"fastapi": "fastapi", "uvicorn": "uvicorn", "sqlalchemy": "sqlalchemy", "prometheus_client": "prometheus-client",
              "multipart": "python-multipart", "fsspec": "fsspec"}  # fmt: skip
    missing = [package for module, package in wanted.items() if find_spec(module) is None]
    if missing:
        raise ValueError(NEEDED.format(missing=", ".join(missing)))


def on_ray(settings: Any, address: str | None, replicas: str, gpus: float) -> Any:
    """What makes the pool of `perfusion serve --ray`. ValueError for what cannot work."""
    import functools
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise ValueError("--ray needs Ray Serve, which is not installed: pip install 'perfusion-kernels[ray]'")
    from perfusion.serve.deployment import Fleet, RayPool

    least, _, most = replicas.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal()):
        raise ValueError(f"--replicas is LEAST:MOST, as 1:8, got {replicas!r}")
    return functools.partial(RayPool, fleet=Fleet(address=address, least=int(least), most=int(most or least), gpus=gpus))


def data_folder() -> Path:
    """Where a server keeps its state by default."""
    import platformdirs

    return Path(platformdirs.user_data_dir("perfusion", appauthor=False)) / "server"


def named_models(models: list[str] | None) -> dict[str, str]:
    """NAME=MODEL options as a mapping. ValueError where two have one name, or a model is not there."""
    from perfusion.models import resolve

    found: dict[str, str] = {}
    for text in models or ["toybox"]:
        name, equals, model = text.partition("=")
        if not equals or os.path.exists(os.path.expanduser(text)):
            name, model = Path(text).name, text
        if name in found:
            raise ValueError(f"--model: two models are named {name!r}; name one with --model NAME={model}")
        found[name] = str(resolve(model))
    return found
