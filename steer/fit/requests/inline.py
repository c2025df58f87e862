"""Data inside a request: arrays of items, or the text of a JSON lines file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from steer.artefacts.concepts.form import LEAST_EXAMPLES
from steer.errors import SteerError
from steer.fit.data import (
    concepts,
    exercises,
    labels,
    pairs,
    preferences,
    questions,
    relations,
    texts,
)
from steer.prompts import Prompt, PromptParam, prompt_of
from steer.prompts.forms import Chat, Text
from steer.spec import Index, exactly_one

Data = TypeVar("Data")


class _Item(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PairParam(_Item):
    """A prompt that has the attribute, and the one most like it that has not."""

    positive: PromptParam
    negative: PromptParam


class TokensParam(_Item):
    """Token ids, read as they are."""

    tokens: Annotated[tuple[Index, ...], Field(min_length=1, max_length=1 << 20, fail_fast=True)]


def given_text(param: PromptParam | TokensParam) -> texts.GivenText:
    """What is read."""
    return param.tokens if isinstance(param, TokensParam) else prompt_of(param)


class LabelledParam(_Item):
    """A text or a chat, and the class it belongs to."""

    model_config = ConfigDict(json_schema_extra=exactly_one("text", "messages", "prompt"))

    text: Text | None = None
    messages: Chat | None = None
    prompt: PromptParam | None = None
    label: Annotated[
        Text, BeforeValidator(labels.label_text, json_schema_input_type=Text | bool | int)
    ]

    @model_validator(mode="after")
    def _one(self) -> LabelledParam:
        if sum(one is not None for one in (self.text, self.messages, self.prompt)) != 1:
            raise ValueError("a labelled text has one of 'text', 'messages' and 'prompt'")
        return self

    def labelled(self) -> labels.Labelled:
        given = next(one for one in (self.text, self.messages, self.prompt) if one is not None)
        return labels.Labelled(prompt_of(given), self.label)


class ExerciseParam(_Item):
    """A prompt and the answer to learn."""

    prompt: PromptParam
    answer: Text


class QuestionParam(_Item):
    """A prompt, what is asked of its state, and the true answer. The state is that of the last
    token of the prompt's `subject` where it names one, else of its last token."""

    prompt: PromptParam
    question: Annotated[str, Field(min_length=1, max_length=questions.MAX_QUESTION)]
    answer: Text


class PreferenceParam(_Item):
    """A prompt, the answer to prefer and the one to avoid; where one is missing, the model
    answers."""

    prompt: PromptParam
    chosen: Text | None = None
    rejected: Text | None = None


class FactParam(_Item):
    """That `object` is the `relation` of `subject`: Paris, capital, France."""

    subject: Text
    relation: Text
    object: Text


@dataclass(frozen=True)
class DataForm(Generic[Data]):
    """How one kind of data comes: in a file, as a file's text, or as an array in `field`.

    `line` describes a file; `flags` make the file an option instead of an argument. A method
    refuses data of fewer than `least` items with `too_few`, under the code `code`.
    """

    field: str
    line: str
    read: Callable[[Path], Data]
    parse: Callable[[bytes, str], Data]
    of: Callable[[Sequence[Any]], Data]
    flags: tuple[str, ...] = ()
    least: int = 1
    too_few: str = ""
    code: str = ""

    def taken(self, array: Sequence[Any] | None, text: str | None) -> Data:
        """What came with a request, in one way or the other. Raises `SteerError` that points at
        the field, and where it came as text names the line."""
        if (array is None) == (text is None):
            raise SteerError(
                f"give the {self.field} either as {self.field!r} or as JSON lines in 'data'",
                code="invalid_value",
            )
        if text is None:
            return self.of(array or ())
        try:
            found = self.parse(text.encode(), "data")
        except SteerError as error:
            raise error.at("/data") from None
        except UnicodeEncodeError as error:
            raise SteerError(
                f"data is not text: {error.reason}", param="/data", code="invalid_value"
            ) from None
        if len(found) < self.least:  # type: ignore[arg-type]
            raise SteerError(self.too_few, param="/data", code=self.code)
        return found


def count(array: Sequence[Any] | None, text: str | None) -> int:
    """How many items came, without reading them."""
    if array is not None:
        return len(array)
    return sum(1 for line in (text or "").splitlines() if line.strip())


PAIRS = DataForm(
    "pairs",
    'JSON lines: {"positive": messages or text, "negative": …}.',
    pairs.read_pairs,
    pairs.parse_pairs,
    lambda given: pairs.PairSet.of(
        [pairs.Pair(prompt_of(one.positive), prompt_of(one.negative)) for one in given]
    ),
    least=2,
    too_few="one pair cannot be told from chance: give at least 2",
    code="no_pairs",
)
LABELLED = DataForm(
    "texts",
    'JSON lines: {"text": …, "label": …}, or with messages or prompt.',
    labels.read_labelled,
    labels.parse_labelled,
    lambda given: labels.LabelledSet.of([one.labelled() for one in given]),
)
EXERCISES = DataForm(
    "exercises",
    'JSON lines: {"prompt": …, "answer": …}.',
    exercises.read_exercises,
    exercises.parse_exercises,
    lambda given: exercises.ExerciseSet.of(
        [exercises.Exercise(prompt_of(one.prompt), one.answer) for one in given]
    ),
)
QUESTIONS = DataForm(
    "questions",
    'JSON lines: {"prompt": …, "question": …, "answer": …}.',
    questions.read_questions,
    questions.parse_questions,
    lambda given: questions.QuestionSet.of(
        [questions.StateQuestion(prompt_of(one.prompt), one.question, one.answer) for one in given]
    ),
)
PREFERENCES = DataForm(
    "preferences",
    'JSON lines: {"prompt": …, "chosen": …, "rejected": …}.',
    preferences.read_preferences,
    preferences.parse_preferences,
    lambda given: preferences.PreferenceSet.of(
        [preferences.Preference(prompt_of(one.prompt), one.chosen, one.rejected) for one in given]
    ),
)
SAID = DataForm(
    "examples",
    'JSON lines: {"text": …, "pairs": {ROLE: FILLER, …}}, or with messages or tokens.',
    concepts.read_said,
    concepts.parse_said,
    concepts.said_texts,
    least=LEAST_EXAMPLES,
    too_few=f"a probe is taught and tried on at least {LEAST_EXAMPLES} examples: give more",
    code="no_examples",
)
FACTS = DataForm(
    "facts",
    'JSON lines: {"subject": …, "relation": …, "object": …}.',
    relations.read_relations,
    relations.parse_relations,
    lambda given: relations.RelationTable.of(
        [relations.Fact(one.subject, one.relation, one.object) for one in given]
    ),
)
PROMPTS: DataForm[list[Prompt]] = DataForm(
    "prompts",
    "JSON lines: texts, messages, or objects with messages, prompt or text.",
    pairs.read_prompts,
    pairs.parse_prompts,
    lambda given: [prompt_of(one) for one in given],
)
GIVEN: DataForm[texts.GivenTexts] = DataForm(
    "prompts",
    'JSON lines: texts, messages, {"tokens": […]}, or the lines of any fit.',
    texts.read_texts,
    texts.parse_texts,
    lambda given: texts.GivenTexts.of([(given_text(one),) for one in given]),
)
