"""Fields that several requests share, and how the command line spells those it cannot guess."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
)

from steer.fit.data.instruction import Placement
from steer.fit.data.prompt import Positions
from steer.fit.data.where import WhereName
from steer.fit.methods.linear.reading import TokensRead
from steer.spec import Layer, LayersOrAll, Site, StoredName, Where


@dataclass(frozen=True)
class Spelled:
    """A field on the command line, where its type and description do not say enough.

    `reads` names how its text is read, `flags` replace the option's name, `argument` makes it a
    positional argument, `hidden` leaves it to jobs. `help` replaces the description.
    """

    reads: (
        Literal[
            "layers",
            "position",
            "tokens",
            "strengths",
            "numbers",
            "sae",
            "prompt",
            "names",
            "where",
            "selection",
            "points",
            "form",
            "place",
        ]
        | None
    ) = None
    help: str | None = None
    flags: tuple[str, ...] = ()
    argument: bool = False
    hidden: bool = False


class RefineParam(BaseModel):
    """The SAE in whose latents the differences are compared (Words in Motion, 2406.11624)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sae: Annotated[str, Field(min_length=1, max_length=256)]


class CaptureRef(BaseModel):
    """States that are kept already."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: Annotated[
        str, Field(min_length=1, max_length=64, description="A finished capture of this model.")
    ]


CaptureField: TypeAlias = Annotated[
    CaptureRef | None,
    Spelled(hidden=True),
    Field(description="Take the states from the files of a capture; the model does not run."),
]

MAX_ITEMS = 1 << 17
"""Items of data in one request."""

Ref: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]


def _all_is_the_default(value: Any) -> Any:
    return None if value == "all" else value


ALL_BY_DEFAULT = BeforeValidator(_all_is_the_default)
"""Of layers that are all unless some are named: `"all"` says so."""

LayerList: TypeAlias = Annotated[
    tuple[Layer, ...], Field(min_length=1, max_length=1024, fail_fast=True)
]

NameField: TypeAlias = Annotated[
    StoredName,
    Spelled(flags=("--name", "-n"), help="The result's name; by default the file's."),
    Field(description="The name to register the result under; of several, how their names begin."),
]
DescriptionField: TypeAlias = Annotated[
    str, Field(max_length=4096, description="A sentence for the card.")
]
LicenceField: TypeAlias = Annotated[
    str, Field(max_length=256, description="The licence for the card.")
]
SiteField: TypeAlias = Annotated[
    Site, Field(description="Where in each block the states are read.")
]
LayersField: TypeAlias = Annotated[
    LayerList | None,
    ALL_BY_DEFAULT,
    Spelled("layers", "Such as 2-5 or 1,3; by default all layers."),
    Field(description="The layers to read; by default all."),
]
PositionsField: TypeAlias = Annotated[
    Positions,
    Spelled("position"),
    Field(
        description="Read the last token, the mean over all but the first, that over the response, "
        "the subject's last token, an index, or the mean over those of a selection: last, mean, "
        'response, subject, -2, {"roles": ["user"]}.'
    ),
]
TokensField: TypeAlias = Annotated[
    TokensRead,
    Spelled("tokens"),
    Field(
        description="The tokens that are read, each by itself: all, last, response, or those of a "
        'selection such as {"roles": ["user"]}.'
    ),
]
ReadWhereField: TypeAlias = Annotated[
    Where | None,
    Spelled("selection"),
    Field(
        description="The tokens that are read, as a spec's 'where' says them; by default all. What "
        "was generated begins with a prompt's response."
    ),
]
WhereField: TypeAlias = Annotated[
    WhereName,
    Field(
        description="Where the vector acts unless a request says otherwise: on the last prompt "
        "token, on that and what is generated (onward), on what is generated, or on every token."
    ),
]
HeldOutField: TypeAlias = Annotated[
    StrictFloat, Field(ge=0, le=0.9, description="The share of the data kept for measuring.")
]
BestField: TypeAlias = Annotated[
    StrictInt,
    Field(ge=1, le=1024, description="How many of the best layers become the default."),
]
Seed: TypeAlias = Annotated[StrictInt, Field(ge=0, le=2**63 - 1)]
SeedField: TypeAlias = Annotated[Seed, Field(description="Draws the held-out share.")]
AskLabellerField: TypeAlias = Annotated[
    StrictBool,
    Spelled(hidden=True),
    Field(description="Ask the labeller that the server's operator has named."),
]
DataField: TypeAlias = Annotated[
    Annotated[str, Field(min_length=1)] | None,
    Field(description="The data as the text of a JSON lines file, instead of an array."),
]


def data_text(value: Any, items: str) -> Any:
    """`value` of a `DataField`, unless it is the data themselves, which go into the field `items`.
    Raises `ValueError`."""
    if isinstance(value, list | tuple | dict):
        raise ValueError(
            "'data' is the text of a JSON lines file: send the items themselves, an array, in "
            f"{items!r}"
        )
    return value


# Of what measures answers

VectorField: TypeAlias = Annotated[
    Ref,
    Spelled(argument=True, help="A registered vector (name or name@hash), or a file."),
    Field(description="A registered vector: name or name@hash."),
]
Score: TypeAlias = Annotated[str, Field(min_length=1, max_length=4096)]
SCORES = "What counts: regex:PATTERN, words:a,b,c or probe:VECTOR."
SCORES_HERE = (
    "What counts: regex:PATTERN, words:a,b,c, words:@FILE, python:module:function, probe:VECTOR, "
    "judge:URL#model=NAME&question=TEXT (with the key in OPENAI_API_KEY), or for the demo model "
    "demo:ATTRIBUTE."
)
ScoreField: TypeAlias = Annotated[
    Score, Spelled(flags=("--score", "-s"), help=SCORES_HERE), Field(description=SCORES)
]
Strength: TypeAlias = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Strengths: TypeAlias = Annotated[
    tuple[Strength, ...], Field(min_length=1, max_length=64, fail_fast=True)
]
UsedLayersField: TypeAlias = Annotated[
    LayersOrAll | None,
    Spelled("layers", "Such as 2-5 or 1,3, or all that the vector has; by default the card's."),
    Field(description="The layers to steer, or all that the vector has; by default the card's."),
]
UsedWhereField: TypeAlias = Annotated[
    Where | None,
    Spelled("where"),
    Field(description="Which tokens are steered; by default the card's."),
]
Sentence: TypeAlias = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"\S")]
OppositeField: TypeAlias = Annotated[
    Sentence | None,
    Spelled(flags=("--opposite",)),
    Field(description="What the other side is told; by default a neutral sentence."),
]
ChosenPlaceField: TypeAlias = Annotated[
    Literal["system", "after", "before"] | None,
    Field(
        description="Where it is told: in the system message, after the question, or before "
        "it; by default where the model listens best."
    ),
]
PlaceField: TypeAlias = Annotated[
    Placement,
    Field(
        description="Where the instruction is told: in the system message, after what the user "
        "says last, or before it. Small models may pass over the system message."
    ),
]
MaxTokensField: TypeAlias = Annotated[
    StrictInt, Field(ge=1, le=4096, description="The length of an answer.")
]
TemperatureField: TypeAlias = Annotated[StrictFloat, Field(ge=0, le=2, description="0 is greedy.")]
SampleSeedField: TypeAlias = Annotated[Seed, Field(description="For temperatures above 0.")]
NullsField: TypeAlias = Annotated[
    StrictInt,
    Field(
        ge=0,
        le=64,
        description="Vectors of chance of each kind, run at the same KL; 0 measures none.",
    ),
]
ExamplesField: TypeAlias = Annotated[
    StrictInt,
    Spelled(hidden=True),
    Field(ge=0, le=16, description="Answers to show of each."),
]
