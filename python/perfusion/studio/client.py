"""`Client`: the HTTP API of `perfusion serve` (docs/server.md) as the page uses it. What goes wrong becomes a sentence."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import functools
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

__all__ = ["Client", "ServerError", "sentence"]

CONNECT, WAIT = 5.0, 330.0  # seconds; a server gives up a picture after 300
CONCEPT_TYPE = "application/octet-stream"


class ServerError(Exception):
    """The server refused, failed, or is not there. The message is a sentence for who sits before the page. status: HTTP's, or None."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(sentence(message))
        self.status = status


def sentence(text: str) -> str:
    """The text with a capital in front and a full stop behind."""
    text = " ".join(text.split()) or "The server gave no reason"
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


@dataclasses.dataclass(frozen=True)
class Event:
    """One server-sent event. picture: PNG, JPEG or WebP bytes of `b64_json`, where it has one."""

    kind: str
    data: dict[str, Any]

    @property
    def picture(self) -> bytes | None:
        return decoded(self.data["b64_json"]) if "b64_json" in self.data else None


class Client:
    """One server, and the key that is sent to it. Safe to use from several threads."""

    def __init__(self, server: str, key: str | None = None, *, http: httpx.Client | None = None):
        self.server, self.key = server.rstrip("/"), key or None
        self._http = http or httpx.Client(timeout=httpx.Timeout(WAIT, connect=CONNECT), trust_env=False)

    def with_key(self, key: str | None) -> Client:
        """The same server and connections, with the key that somebody typed; without one, this client."""
        return Client(self.server, key.strip(), http=self._http) if key and key.strip() else self

    # the routes

    def bases(self) -> list[dict[str, Any]]:
        return [model for model in self._json("GET", "/v1/models")["data"] if model.get("kind") == "base"]

    def concepts(self) -> list[dict[str, Any]]:
        return self._json("GET", "/v1/concepts")["data"]

    def concept(self, name: str) -> dict[str, Any]:
        return self._json("GET", f"/v1/concepts/{quote(name, safe='')}")

    def concept_file(self, name: str) -> bytes:
        return self._send("GET", f"/v1/concepts/{quote(name, safe='')}/file").content

    def upload(self, file: Path, name: str | None = None) -> dict[str, Any]:
        with open(file, "rb") as content:
            return self._json(
                "POST", "/v1/concepts", files={"file": (Path(file).name, content, CONCEPT_TYPE)}, data={"name": name} if name else {}
            )

    def delete(self, name: str) -> None:
        self._json("DELETE", f"/v1/concepts/{quote(name, safe='')}")

    def draw(self, request: Mapping[str, Any]) -> list[tuple[bytes, int | None]]:
        """Pictures and their seeds."""
        found = self._json("POST", "/v1/images/generations", json=dict(request))
        return [(decoded(each.get("b64_json")), each.get("seed")) for each in found["data"]]

    def watch_drawing(
        self, request: Mapping[str, Any], partial_images: int = 3, *, opened: Callable[[Callable[[], None]], None] | None = None
    ) -> Iterator[Event]:
        """One picture, as it comes into being: events `image_generation.partial_image`, then `image_generation.completed`.

        opened: is given what breaks the connection, from another thread, by which the server stops drawing.
        """
        wanted = {**request, "n": 1, "stream": True, "partial_images": partial_images}
        yield from self._events("POST", "/v1/images/generations", opened, json=wanted)

    def train(self, pictures: Sequence[tuple[str, bytes]], masks: Sequence[bytes], **fields: Any) -> dict[str, Any]:
        """pictures: (file name, bytes). masks: PNG bytes, one for each picture, or none. fields: of docs/server.md."""
        files = [("pictures", (name, data)) for name, data in pictures]
        files += [("masks", (f"{number}.png", data, "image/png")) for number, data in enumerate(masks)]
        return self._json("POST", "/v1/concepts/train", files=files, data={name: str(value) for name, value in fields.items()})

    def jobs(self) -> list[dict[str, Any]]:
        return self._json("GET", "/v1/jobs")["data"]

    def watch_job(self, id: str) -> Iterator[Event]:
        yield from self._events("GET", f"/v1/jobs/{quote(id, safe='')}/events")

    def job_action(self, id: str, action: str) -> dict[str, Any]:
        """action: "cancel" or "resume"."""
        return self._json("POST", f"/v1/jobs/{quote(id, safe='')}/{action}")

    # HTTP

    def _request(self, method: str, path: str, **content: Any) -> httpx.Request:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return self._http.build_request(method, self.server + path, headers=headers, **content)

    def _open(self, request: httpx.Request, stream: bool) -> httpx.Response:
        try:
            response = self._http.send(request, stream=stream)
        except httpx.TimeoutException:
            raise ServerError(f"the server at {self.server} took too long to answer; try again, or ask for fewer steps") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol):
            raise ServerError(f"{self.server} is no address of a server; one is written http://127.0.0.1:8000") from None
        except httpx.TransportError:
            raise ServerError(f"the server at {self.server} does not answer; start one with `perfusion serve`") from None
        if response.status_code >= 400:
            with contextlib.closing(response):
                response.read()
                raise self._refusal(response)
        return response

    def _refusal(self, response: httpx.Response) -> ServerError:
        try:
            message = str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"the server answered with status {response.status_code} and no reason"
        after = response.headers.get("Retry-After", "")
        if response.status_code == 401:
            message = f"{message.rstrip('.')}. Type your key under Connection"
        elif after.isdecimal() and "try again" not in message:
            message = f"{message.rstrip('.')}. Try again in {after} seconds"
        return ServerError(message, response.status_code)

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        return self._open(self._request(method, path, **content), stream=False)

    def _json(self, method: str, path: str, **content: Any) -> Any:
        try:
            return self._send(method, path, **content).json()
        except ValueError:
            raise ServerError(f"{self.server} does not speak as `perfusion serve` does; check the address") from None

    def _events(self, method: str, path: str, opened: Any = None, **content: Any) -> Iterator[Event]:
        """Server-sent events until the stream ends; leaving the iterator closes the connection. An event `error` is raised."""
        request = self._request(method, path, **content)
        request.extensions["timeout"] = httpx.Timeout(WAIT, connect=CONNECT).as_dict()
        with contextlib.closing(self._open(request, stream=True)) as response:
            if opened is not None:
                opened(functools.partial(_break, response))
            kind, data = "message", []
            try:
                for line in response.iter_lines():
                    field, _, value = line.partition(":")
                    value = value.removeprefix(" ")
                    if field == "event":
                        kind = value
                    elif field == "data":
                        data.append(value)
                    elif not line and data:
                        event = self._event(kind, "\n".join(data))
                        if event is not None:
                            yield event
                        kind, data = "message", []
            except httpx.TransportError:
                raise ServerError("the connection to the server broke; what was being made there may still be finished") from None

    def _event(self, kind: str, text: str) -> Event | None:
        if text == "[DONE]":
            return None
        try:
            data = json.loads(text)
        except ValueError:
            raise ServerError("the server sent an event that cannot be read; its version may be another") from None
        kind = data.get("type", kind) if kind == "message" else kind
        if kind == "error":
            raise ServerError(str(data.get("error", data).get("message", "the server failed")))
        return Event(kind, data)


def _break(response: httpx.Response) -> None:
    """Shut the connection down under the thread that reads it, which a close would wait for."""
    stream = response.extensions.get("network_stream")
    found = stream.get_extra_info("socket") if stream is not None else None
    with contextlib.suppress(OSError):
        if found is not None:
            found.shutdown(socket.SHUT_RDWR)


def decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, binascii.Error):
        raise ServerError("the server sent a picture that cannot be read") from None
