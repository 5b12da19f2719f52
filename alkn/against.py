"""The sets of a step under reference models: what the evaluation holds a model against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import nn

from alkn.core.probe import Probe, References
from alkn.encoding import Encoder
from alkn.models import load_model
from alkn.project import Project
from alkn.record_sets import Records, by_domain, earlier_records, load_split
from alkn.reference import Reference, open_reference, request_records
from alkn.runtime import Runtime
from alkn.settings import Settings

NONE_NAMED = "there is no reference model: evaluation.references names none ('alkn reference' makes one)"


class ReferenceModels:
    """The reference models that the settings name, loaded when a metric asks for them.

    Args:
        project: whose requests and splits are measured.
        settings: which references, templates, device.
        request: the request whose records the set ``forget`` holds.

    Raises:
        InputError: if there is no reference of that name.
        ChainBroken: if a reference is not what its manifest says.
    """

    def __init__(self, project: Project, settings: Settings, *, request: str) -> None:
        self._project, self._settings, self._request = project, settings, request
        self._members = [_Member(open_reference(project, one), settings) for one in settings.evaluation.references]

    def of(self, set_name: str) -> References:
        """The set under each reference that never saw it."""
        if not self._members:
            return References(reason=NONE_NAMED)
        kind, _, name = set_name.partition("/")
        request = self._request if kind == "forget" else name
        fitting = self._members
        if kind in ("forget", "earlier"):
            fitting = [member for member in fitting if member.never_saw(request)]
            size = self._settings.evaluation.earlier_records if kind == "earlier" else None
            sampled = size is not None and self._project.request(request).is_file()
            records = (
                earlier_records(self._project, request, size).records
                if sampled
                else request_records(self._project, request)
            )
        elif kind == "holdout":
            records = load_split(self._project, "holdout")
        elif kind in ("retain", "utility"):
            records = by_domain(load_split(self._project, kind))[name]
        else:
            return References(reason="reference models are not asked about this set")
        if not records:
            return References(reason="there are no records")
        if not fitting:
            return References(reason=f"no reference model that evaluation.references names was made without {request}")
        return References({member.reference.digest: member.probe(set_name, records, self) for member in fitting})


class _Member:
    """One reference model and its probes."""

    def __init__(self, reference: Reference, settings: Settings) -> None:
        self.reference, self._settings = reference, settings
        self._probes: dict[str, Probe] = {}

    def never_saw(self, request: str) -> bool:
        """Whether it was made without the request; of a user's own model that is the user's word."""
        without: Sequence[str] | None = self.reference.manifest["without"]
        return without is None or request in without

    @cached_property
    def model(self) -> nn.Module:
        remote = self._settings.base.trust_remote_code
        return load_model(self.reference.model, device=Runtime(self._settings.run).device, trust_remote_code=remote)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder.of(self.reference.model, self._settings)

    def probe(self, set_name: str, records: Records, models: ReferenceModels) -> Probe:
        if set_name not in self._probes:
            self._probes[set_name] = Probe(
                lambda: self.model,
                self.encoder.record_set(set_name, records),
                decode=self.encoder.decode,
                eos=self.encoder.tokenizer.eos_token_id,
                max_new_tokens=self._settings.evaluation.answer_length(set_name),
                holdout=self._holdout(set_name, models),
            )
        return self._probes[set_name]

    def _holdout(self, set_name: str, models: ReferenceModels) -> Probe | None:
        return None if set_name == "holdout" else models.of("holdout").probes.get(self.reference.digest)
