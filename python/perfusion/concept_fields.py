"""The rules for a concept's fields that are no tensors, for the concept in torch and for the one in numpy."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

from perfusion.settings import BIAS, TEMPERATURE, Setting

__all__ = ["check_fields", "check_name"]

TEXT_BYTES = 64  # of each free text field, as JSON text in UTF-8: bounds the file's header
COVARIANCE_BYTES = 24
RECIPE_BYTES = 248  # of the recipe, as a JSON string that holds JSON

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def check_fields(concept: Any) -> None:
    """ValueError unless all fields of a concept but the tensors keep their rules; it says which field broke which, and what came."""
    check_name(concept.name)
    _check_text("superclass", concept.superclass, TEXT_BYTES, required=True)
    _check_text("covariance", concept.covariance, COVARIANCE_BYTES)
    _check_text("license", concept.license, TEXT_BYTES)
    _check_text("author", concept.author, TEXT_BYTES)
    _check_date(concept.created)
    _check_recipe(concept.recipe)
    _check_number(BIAS, concept.bias)
    _check_number(TEMPERATURE, concept.temperature)


def _short(value: Any, size: int = 80) -> str:
    """A value in quotes, and where it is too long for a message, a sign that it goes on."""
    text = repr(value)
    return text if len(text) <= size else text[: size - 1] + "…"


def check_name(name: Any) -> None:
    """ValueError unless `name` can be a concept's name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"a concept's name must be 1 to 32 characters of a-z, 0-9, '-' and '_', the first a letter or digit, got {_short(name)}"
        )


def _json_bytes(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8"))


def _check_text(field: str, value: Any, limit: int, *, required: bool = False) -> None:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"a concept's {field} must be printable text on one line, got {_short(value)}")
    if value != value.strip() or (required and not value):
        raise ValueError(f"a concept's {field} must not be empty or begin or end with a space, got {_short(value)}")
    size = _json_bytes(value) - 2
    if size > limit:
        raise ValueError(f"a concept's {field} must be at most {limit} bytes as JSON text in UTF-8, got {size}: {_short(value)}")


def _check_date(value: Any) -> None:
    try:
        if not _DATE.fullmatch(value):
            raise ValueError(value)
        datetime.datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ")
    except (TypeError, ValueError):
        raise ValueError(f"a concept's time created must be a UTC time like 2025-01-31T12:00:00Z, got {_short(value)}") from None


def _check_recipe(recipe: Any) -> None:
    plain = (str, int, float, bool, type(None))
    pairs = recipe.items() if isinstance(recipe, dict) else [(None, None)]
    items = [item for _, value in pairs for item in (value if isinstance(value, list) else [value])]
    keys = [key for key, _ in pairs]
    if not all(isinstance(item, plain) for item in items) or not all(isinstance(key, str) for key in keys):
        came = _short(recipe, 200)
        raise ValueError(f"a concept's recipe must map text to text, numbers, true, false, None or lists of them, got {came}")
    if not all(item.isprintable() for item in (*keys, *items) if isinstance(item, str)):
        raise ValueError(f"a concept's recipe must hold printable text on one line, got {_short(recipe, 200)}")
    try:
        size = _json_bytes(json.dumps(recipe, ensure_ascii=False, separators=(",", ":"), allow_nan=False)) - 2
    except ValueError:
        raise ValueError(f"a concept's recipe must hold finite numbers, got {_short(recipe, 200)}") from None
    if size > RECIPE_BYTES:
        raise ValueError(f"a concept's recipe must be at most {RECIPE_BYTES} bytes as JSON text, got {size}. Leave something out.")


def _check_number(setting: Setting, value: Any) -> None:
    if not setting.holds(value):
        raise ValueError(f"a concept's {setting.name} must be a number from {setting.low:g} to {setting.high:g}, got {_short(value)}")
