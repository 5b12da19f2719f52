"""A registered entry by its name with its parameters, and what is said of settings that are wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_serializer

from alkn import registry
from alkn.errors import WrongKeys
from alkn.registry import Params


class Chosen(BaseModel):
    """A registered entry's name with its validated parameters, written as one flat mapping."""

    model_config = ConfigDict(frozen=True)
    name: str
    params: Params

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {"name": self.name, **self.params.model_dump(mode="json")}


def refuse_unknown(known: registry.Registry, names: Mapping[str, str]) -> None:
    """Refuse names that nobody registered, all at once; a name maps to its key below the section."""
    unknown = [
        (key, registry.unknown_name(known.kind, name, known)) for name, key in names.items() if name not in known
    ]
    if unknown:
        raise WrongKeys(unknown)


def parameters_of(entry: registry.Entry, values: Any) -> Params:
    """An entry's parameters from plain values; its wrong keys are those of the section that it stands in."""
    try:
        return entry.params.model_validate(values)
    except ValidationError as error:
        raise WrongKeys(_faults(error, entry.params)) from None


def choose(known: registry.Registry, kind: type[Chosen] = Chosen) -> BeforeValidator:
    """Turns a name, or a mapping with the key ``name`` and parameters, into a choice among what is registered."""

    def validate(value: Any) -> Any:
        if isinstance(value, Chosen):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ValueError(f"expected a mapping with the key 'name', one of: {', '.join(known)}")
        rest = {k: v for k, v in value.items() if k != "name"}
        refuse_unknown(known, {value["name"]: ""})
        entry = known[value["name"]]
        return kind(name=entry.name, params=parameters_of(entry, rest))

    return BeforeValidator(validate)


class ChosenMetric(Chosen):
    """A metric; one that has no parameters is written as its name alone."""

    @model_serializer
    def _flat(self) -> Any:
        rest = self.params.model_dump(mode="json")
        return {"name": self.name, **rest} if rest else self.name


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line an error: key, what was expected, what was found, the nearest known key."""
    lines = [f"{(prefix + key).rstrip('.') or 'settings'}: {fault}" for key, fault in _faults(error, model)]
    return list(dict.fromkeys(lines))


def _faults(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, str]]:
    """Each error as its key and what is wrong with it."""
    faults: list[tuple[str, str]] = []
    for item in error.errors(include_url=False):
        path, known = _resolve(model, item["loc"])
        key = ".".join(path)
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, WrongKeys):
            faults += [(f"{key}.{below}".strip("."), fault) for below, fault in cause.faults]
            continue
        if item["type"] == "extra_forbidden":
            faults.append((key, registry.unknown_name("key", path[-1], known)))
            continue
        found = item.get("input")
        shown = repr(found) if isinstance(found, str | int | float | None) else f"a {type(found).__name__}"
        expected = item["msg"].removeprefix("Value error, ")
        faults.append((key, f"{expected[:1].lower() + expected[1:]}; found {shown}"))
    return faults


def _resolve(model: Any, loc: Sequence[Any]) -> tuple[list[str], list[str]]:
    """The keys of a location, without pydantic's own union labels, and the keys known at its parent."""
    path: list[str] = []
    known: list[str] = []
    for part in loc:
        fields = model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else None
        if fields is None:
            if isinstance(part, int):
                path.append(str(part))
                inner = [a for a in get_args(model) if isinstance(a, type) and issubclass(a, BaseModel)]
                model = inner[0] if inner else None
            continue
        known = sorted(fields)
        path.append(str(part))
        model = fields[part].annotation if part in fields else None
    return path, known
