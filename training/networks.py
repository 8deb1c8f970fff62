"""Whose published network a data set takes, where none is asked for by `--network-of`."""

from __future__ import annotations

#: The data sets that networks are published for; models/ has what is theirs.
NETWORKS = ("tetrominoes", "multi-dsprites", "clevr6")

#: By data set, whose network it takes: that of images which are alike in size and in what they show. A data set that is
#: not here takes `NETWORKS[0]`, which decodes at full resolution and so suits every size, and the run says so.
NETWORK_OF = {
    "tetrominoes": "tetrominoes",
    "shapes": "tetrominoes",
    "multi-dsprites": "multi-dsprites",
    "multi-dsprites-binarized": "multi-dsprites",
    "multi-dsprites-colored": "multi-dsprites",
    "objects-room": "multi-dsprites",
    "objects-room-six-objects": "multi-dsprites",
    "objects-room-empty-room": "multi-dsprites",
    "objects-room-identical-color": "multi-dsprites",
    "clevr": "clevr6",
    "clevr6": "clevr6",
    "clevr10": "clevr6",
    "clevr-like": "clevr6",
    "clevr6-like": "clevr6",
}
