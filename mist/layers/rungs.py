"""The rungs of the memory ladder: what each level does with norms, activations and attention.

Each keeps less than the one above it, at about the same time; `tempo` is the paper's own row.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from mist.layers.activation_functions import ActivationRung
from mist.layers.norms import NormRung


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """What becomes of the parts of a layer.

    `linears`: matrices keep the sources of a dropped input. `attention`: attention that is written
    out keeps no dropped-out probabilities. `exact`: gradients are those of the plain layer.
    """

    name: str
    norms: NormRung
    activations: ActivationRung
    linears: bool
    attention: bool
    exact: bool
    meaning: str


RUNGS: Final = MappingProxyType(
    {
        each.name: each
        for each in (
            Rung(
                name="fused",
                norms="fused",
                activations="fused",
                linears=False,
                attention=False,
                exact=True,
                meaning="norms and gated products in one step each, without fp32 copies",
            ),
            Rung(
                name="drop-activation",
                norms="fused",
                activations="drop",
                linears=True,
                attention=True,
                exact=True,
                meaning="fused, and results of activations and gated products are made again",
            ),
            Rung(
                name="drop-norm",
                norms="drop",
                activations="drop",
                linears=True,
                attention=True,
                exact=True,
                meaning="drop-activation, and results of norms are made again",
            ),
            Rung(
                name="norm-output",
                norms="output",
                activations="drop",
                linears=True,
                attention=True,
                exact=False,
                meaning="drop-activation, and norms keep their result in the place of their input",
            ),
            Rung(
                name="tempo",
                norms="output",
                activations="output",
                linears=False,
                attention=True,
                exact=False,
                meaning="as the paper: GELU and norms from their results, dropout made again",
            ),
        )
    }
)
