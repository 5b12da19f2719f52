"""Registries: a new method, metric, attack, gate or benchmark is one new file with one decorator.

Each package under ``alkn`` (``methods``, ``metrics``, ...) is imported whole the first time that its
registry is read, so registering needs no second edit.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from alkn.errors import InputError


class Params(BaseModel):
    """Base of every part of the settings: frozen, numbers finite, and unknown keys are errors.

    Attributes:
        later: keys that came after settings had been frozen: written only where they are used, so that those stay the
            same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    later: ClassVar[tuple[str, ...]] = ()

    def is_written(self, key: str) -> bool:
        """Whether a dump of these parameters has the key."""
        return key not in self.later or getattr(self, key) != type(self).model_fields[key].get_default()

    @model_serializer(mode="wrap")
    def _what_is_written(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if self.is_written(key)}


@dataclass(frozen=True)
class Entry:
    """One registered callable with its parameters' type, where it comes from and what it looks at.

    ``scope`` is ``records`` for what looks at one set of records, ``model`` for what looks at all. ``sets`` are the
    kinds of sets that it makes sense on (``forget``, ``earlier``, ...); none named: all.
    """

    name: str
    call: Callable[..., Any]
    params: type[Params]
    source: str
    scope: str = "records"
    sets: tuple[str, ...] = ()

    def looks_at(self, set_name: str) -> bool:
        """Whether it is computed on a set of this name."""
        return not self.sets or set_name.split("/")[0] in self.sets


class Registry(Mapping[str, Entry]):
    """A mapping name -> :class:`Entry` that answers an unknown name with the known ones."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")

    def register(
        self,
        name: str,
        *,
        params: type[Params] = Params,
        source: str,
        scope: str = "records",
        sets: tuple[str, ...] = (),
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator that enters a callable under ``name``; a name that is taken is refused."""

        def enter(call: Callable[..., Any]) -> Callable[..., Any]:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is already registered")
            self._entries[name] = Entry(name, call, params, source, scope, sets)
            return call

        return enter

    def __getitem__(self, name: str) -> Entry:
        self._load()
        if name not in self._entries:
            raise InputError(unknown_name(self.kind, name, self._entries))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._load()
        return len(self._entries)


def unknown_name(kind: str, name: str, known: Mapping[str, Any] | list[str]) -> str:
    """The message for a name that nobody registered: the nearest spelling, then all known."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}."


methods = Registry("method", "alkn.methods")
metrics = Registry("metric", "alkn.metrics")
attacks = Registry("attack", "alkn.attacks")
gates = Registry("gate", "alkn.gates")
benchmarks = Registry("benchmark", "alkn.benchmarks")

register_method = methods.register
register_metric = metrics.register
register_attack = attacks.register
register_gate = gates.register
register_benchmark = benchmarks.register
