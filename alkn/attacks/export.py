"""Export: does the user's own form of the model, as it is served, know more than the model that was judged?"""

from __future__ import annotations

import torch
from pydantic import Field

from alkn.core.attack import Curve, Target, known_at
from alkn.core.distributed import refuse_split
from alkn.registry import Params, register_attack


class ExportParams(Params):
    """What is measured.

    Attributes:
        folder: of the quantised, pruned or merged model, in any form that transformers loads; ``{request}``
            stands for the step's id. Relative to the project folder.
    """

    folder: str = Field("exports/{request}", min_length=1)


@register_attack("export", params=ExportParams, source="own; after Zhang et al. 2024")
def export(target: Target, params: ExportParams) -> Curve:
    """P and exact memorization of each request and P of each utility set: the model as stored, and the export."""
    refuse_split(target.model, "export")
    first = known_at(torch.finfo(next(target.model.parameters()).dtype).bits, target, target.model)
    exported, bits = target.load(params.folder)
    return Curve("bits", (first, known_at(bits, target, exported)), {"exports": 1})
