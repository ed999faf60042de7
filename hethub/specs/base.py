"""What all specs share: strict pydantic models, and their errors as lines of file, line and key."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hethub.errors import InputError
from hethub.specs.document import Document, Key
from hethub.specs.nearest import unknown_name

__all__ = [
    "NAME_PATTERN",
    "Name",
    "Problems",
    "Spec",
    "json_schema",
    "validate_document",
]

NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
"""A name that may become part of a path, a label or a device name."""

_SHOWN_PROBLEMS = 50  # a person mends the first ones and runs again


class Spec(BaseModel):
    """A part of a file that people write: strict, frozen, unknown keys refused. Validators are built when they are
    first used: most are parts of larger ones."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", defer_build=True)


T = TypeVar("T", bound=BaseModel)


class Problems:
    """Collects what is wrong with a file, to tell it all at once. `prefix` leads to the part looked at."""

    def __init__(self, document: Document, prefix: Sequence[Key] = ()) -> None:
        self._document = document
        self._prefix = tuple(prefix)
        self._lines: list[str] = []

    def add(self, keys: Sequence[Key], text: str) -> None:
        """Note a problem of the value at `keys`; `text` says what is wrong and what to do."""
        self._lines.append(self._document.line((*self._prefix, *keys), text))

    def __bool__(self) -> bool:
        return bool(self._lines)

    def raise_any(self) -> None:
        """Raise one InputError with a line per problem, if there is any."""
        if self._lines:
            rest = len(self._lines) - _SHOWN_PROBLEMS
            more = [f"... and {rest} more. Mend these first."] if rest > 0 else []
            raise InputError("\n".join(self._lines[:_SHOWN_PROBLEMS] + more))


def validate_document(document: Document, model: type[T]) -> T:
    """The document as `model`. Raises InputError with one line per problem, all together."""
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        problems = Problems(document)
        for keys, text in _explain(error, document.value, model):
            problems.add(keys, text)
        problems.raise_any()
        raise


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema that editors complete and check the file with."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}


_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "none_required": "nothing",
    "string_type": "text",
    "tuple_type": "a list",
}

_LIMITS = {
    "greater_than_equal": "{given} is less than {ge}. Give at least {ge}.",
    "greater_than": "{given} is not more than {gt}. Give more.",
    "less_than_equal": "{given} is more than {le}. Give at most {le}.",
    "less_than": "{given} is not less than {lt}. Give less.",
    "too_short": "has {actual_length} entries. Give at least {min_length}.",
    "too_long": "has more than {max_length} entries. Give at most {max_length}.",
}


def _explain(
    error: ValidationError, value: Any, model: type[BaseModel]
) -> Iterator[tuple[tuple[Key, ...], str]]:
    """(keys, text) of each problem; what the branches of a union expected at one place is told once."""
    told: dict[tuple[Key, ...], list[Any]] = {}
    for item in error.errors(include_url=False):
        told.setdefault(_keys(item, value), []).append(item)
    missing = [keys for keys, items in told.items() if items[0]["type"] == "missing"]
    for keys, items in told.items():
        expected = [_EXPECTED.get(item["type"]) or _literals(item) for item in items]
        if len(items) > 1 and all(expected):
            yield keys, f"expected {' or '.join(filter(None, expected))}, got {_shown(items[0]['input'])}."
        else:
            # A mapping that lacks one key and has an unknown one most likely means that one.
            lacking = [other[-1] for other in missing if other[:-1] == keys[:-1]]
            likely = str(lacking[0]) if len(lacking) == 1 else None
            for item in items:
                yield keys, _describe(item, keys, model, likely)


def _keys(item: Any, value: Any) -> tuple[Key, ...]:
    """The place in the file: pydantic's location less its marks for union branches and the like."""
    keys: list[Key] = []
    for element in item["loc"]:
        if (isinstance(value, dict) and element in value) or (
            isinstance(value, list) and isinstance(element, int) and element < len(value)
        ):
            value = value[element]
            keys.append(element)
    if item["type"] == "missing":
        keys.append(item["loc"][-1])
    return tuple(keys)


def _describe(item: Any, keys: Sequence[Key], model: type[BaseModel], likely: str | None) -> str:
    """What is wrong and what to do; `likely` is the key that an unknown one stands for if it is like none."""
    kind = item["type"]
    if kind == "extra_forbidden":
        spec = _spec_at(model, item["loc"][:-1])
        return unknown_name("unknown key", str(keys[-1]), spec.model_fields if spec else (), likely=likely)
    if kind == "missing":
        return f"required key is missing. Add it{_description(model, item['loc'])}."
    if kind == "literal_error":
        return _unknown_word(item, keys)
    return _refused_value(kind, item, _shown(item["input"]))


def _refused_value(kind: str, item: Any, given: str) -> str:
    context = item.get("ctx", {})
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {given}. Change it."
    if kind == "string_pattern_mismatch" and context["pattern"] == NAME_PATTERN:
        return (
            f"{given} is not a name. Use 1 to 64 letters, digits, '.', '-' and '_', a letter or digit first."
        )
    if kind == "value_error":
        return _sentence(str(context["error"]))
    if kind in _LIMITS:
        return _LIMITS[kind].format(given=given, **context)
    return f"{item['msg']}, got {given}. Change it."


def _unknown_word(item: Any, keys: Sequence[Key]) -> str:
    word = keys[-1] if item["loc"][-1] == "[key]" else item["input"]
    known = re.findall(r"'([^']*)'", item["ctx"]["expected"]) or re.findall(r"\w+", item["ctx"]["expected"])
    return unknown_name(f"{_shown(word)} is not known here", str(word), known)


def _literals(item: Any) -> str | None:
    return item["ctx"]["expected"] if item["type"] == "literal_error" else None


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _shown(value: Any) -> str:
    """A value as messages show it: short, and what people wrote."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if not isinstance(value, str | int | float):
        return type(value).__name__
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _description(model: type[BaseModel], loc: Sequence[Key]) -> str:
    spec = _spec_at(model, loc[:-1])
    field = spec.model_fields.get(str(loc[-1])) if spec else None
    return f": {field.description.rstrip('.')}" if field and field.description else ""


def _spec_at(model: type[BaseModel], loc: Sequence[Key]) -> type[BaseModel] | None:
    """The model class that validated the mapping at pydantic's location `loc`."""
    found: list[Any] = [model]
    for element in loc:
        # Marks of union branches lead nowhere: stay, with all branches.
        found = [inner for outer in found for inner in _step(outer, element)] or found
    return next((one for one in found if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _step(annotation: Any, element: Key) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(element))
        return _branches(field.annotation) if field else []
    if get_origin(annotation) is dict:
        return _branches(get_args(annotation)[1])
    if get_origin(annotation) is list and isinstance(element, int):
        return _branches(get_args(annotation)[0])
    return []


def _branches(annotation: Any) -> list[Any]:
    """The parts of a union, annotations stripped."""
    if get_origin(annotation) is Annotated:
        return _branches(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for part in get_args(annotation) for inner in _branches(part)]
    return [annotation]
