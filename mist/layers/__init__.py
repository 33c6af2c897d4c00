"""Tempo's layers and their generalisation: exact ways to keep less for the backward pass.

    import mist.layers
    mist.layers.convert(model, "drop-norm")

`convert` gives a model a memory level; `head_loss` computes the loss without all logits at once.
"""

from mist.layers.deferred_logits import DeferredHead, defer_logits
from mist.layers.layer_form import LayerForm, layer_form
from mist.layers.loss_heads import VocabularyPart, head_loss
from mist.layers.rungs import RUNGS
from mist.layers.surgery import Conversion, convert, convert_layer

__all__ = [
    "RUNGS",
    "Conversion",
    "DeferredHead",
    "LayerForm",
    "VocabularyPart",
    "convert",
    "convert_layer",
    "defer_logits",
    "head_loss",
    "layer_form",
]
