"""zlib attack: log-probability against how well the text can be compressed anyway."""

from __future__ import annotations

from alkn.core.measured import Measured
from alkn.core.privacy import ATTACKED, attacked, zlib_score
from alkn.core.probe import Probe
from alkn.membership import MembershipParams
from alkn.registry import register_metric


@register_metric("zlib", params=MembershipParams, source="Carlini et al. 2021, section 5.1", sets=ATTACKED)
def zlib(probe: Probe, params: MembershipParams) -> Measured:
    """−(total NLL) / (bytes of the answer under zlib), nats a byte, ≤ 0; part ``auc``: against the holdout."""
    return attacked(probe, "zlib", scores, **params.model_dump())


def scores(probe: Probe) -> Measured:
    """Of each record."""
    pairs = zip(probe.scores.token_log_probs, probe.records.references, strict=True)
    return Measured.mean(probe.records.ids, [zlib_score(logs, text) for logs, text in pairs])
