"""The options that name a network, for every command that makes features."""

from typing import Annotated, Literal

import typer

BackboneOption = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE[:TENSOR]",
        help="The CNN that turns an image into features: a name, or the file of a model and a tensor in it.",
    ),
]
PresetOption = Annotated[
    Literal["imagenet", "torchvision", "keras", "minus1to1", "zero_to_one", "efficientnet_lite", "raw"] | None,
    typer.Option(help="Preprocessing of a backbone from a file; guessed from its input if not given."),
]
