"""Who asks, and whether they may: what routes depend on."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from perfusion.serve.errors import ApiError
from perfusion.serve.keys import LOCAL, Principal
from perfusion.serve.server import Server

__all__ = ["NAME", "Admin", "Drawer", "Namespace", "ServerOf", "Trainer", "Uploader"]

NAME = "^[a-z0-9][a-z0-9_-]{0,31}$"  # of a key, a namespace, a concept

_bearer = HTTPBearer(auto_error=False)


def _server(request: Request) -> Server:
    return request.app.state.server


ServerOf = Annotated[Server, Depends(_server)]


def _principal(
    request: Request, server: ServerOf, given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> Principal:
    principal = None if given is None else server.keys.find(given.credentials)
    if principal is None and server.settings.loopback and not server.keys.any():
        principal = LOCAL  # also with a key, which some clients insist on
    if principal is None:
        raise ApiError(401, "give a key that this server knows: Authorization: Bearer KEY", code="invalid_api_key")
    request.scope["perfusion.key"] = principal.name
    return principal


def _require(scope: str) -> Any:
    def check(principal: Annotated[Principal, Depends(_principal)]) -> Principal:
        if not principal.may(scope):
            raise ApiError(403, f"this key lacks the scope {scope!r}", code="scope")
        return principal

    return Depends(check)


Drawer = Annotated[Principal, _require("draw")]
Uploader = Annotated[Principal, _require("upload")]
Trainer = Annotated[Principal, _require("train")]
Admin = Annotated[Principal, _require("admin")]


def _namespace(
    principal: Annotated[Principal, Depends(_principal)],
    namespace: Annotated[str | None, Query(pattern=NAME, description="Another namespace, for admins.")] = None,
) -> str:
    if namespace is None or namespace == principal.name:
        return principal.name
    if "admin" not in principal.scopes:
        raise ApiError(403, "only a key with the scope 'admin' sees other namespaces", param="namespace", code="scope")
    return namespace


Namespace = Annotated[str, Depends(_namespace)]
