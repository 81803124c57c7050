"""The options that select a backbone, shared by all commands that compute features."""

from typing import Annotated, Literal

import typer

BackboneOption = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE[:TENSOR]", help="CNN that computes the features: a name, or a model file and a tensor in it."
    ),
]
WeightsOption = Annotated[str, typer.Option(help="Weights: imagenet, random, or a weights file saved by Keras.")]
PresetOption = Annotated[
    Literal["imagenet", "torchvision", "keras", "minus1to1", "zero_to_one", "efficientnet_lite", "raw"] | None,
    typer.Option(help="Preprocessing of a backbone from a file; default: inferred from its input."),
]
