"""Fitting vectors, adapters and dictionaries from data, and measuring what they do."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steer.fit.data.concepts import SaidText, read_said, said_texts
    from steer.fit.data.exercises import Exercise, ExerciseSet, read_exercises
    from steer.fit.data.labels import Labelled, LabelledSet, read_labelled
    from steer.fit.data.pairs import Pair, PairSet, read_pairs
    from steer.fit.data.preferences import Preference, PreferenceSet, read_preferences
    from steer.fit.data.questions import QuestionSet, StateQuestion, read_questions
    from steer.fit.data.relations import Fact, RelationTable, Template, read_relations
    from steer.fit.methods.detectors.fitting import fit_detector
    from steer.fit.methods.dictionaries.nmf import fit_nmf
    from steer.fit.methods.dictionaries.snmf import fit_snmf
    from steer.fit.methods.fitting import fit
    from steer.fit.methods.lenses.jacobian import fit_jacobian_lens
    from steer.fit.methods.lenses.token import fit_token
    from steer.fit.methods.lenses.tuned_lens import fit_tuned_lens
    from steer.fit.methods.linear.act import fit_act
    from steer.fit.methods.linear.alphasteer import fit_alphasteer
    from steer.fit.methods.linear.angular import fit_angular
    from steer.fit.methods.linear.conceptor import fit_conceptor
    from steer.fit.methods.linear.psr import fit_psr
    from steer.fit.methods.lrc import fit_lrc
    from steer.fit.methods.one_vs_rest import fit_labels
    from steer.fit.methods.trained.asked_oracle import fit_oracle
    from steer.fit.methods.trained.concepts import fit_concepts
    from steer.fit.methods.trained.low_rank import fit_low_rank
    from steer.fit.methods.trained.prosv import fit_prosv
    from steer.fit.methods.trained.reps import fit_reps
    from steer.fit.methods.transfer import transfer
    from steer.fit.methods.two_prompts import fit_two_prompts
    from steer.prompts import Marked

__all__ = [
    "Exercise",
    "ExerciseSet",
    "Fact",
    "Labelled",
    "LabelledSet",
    "Marked",
    "Pair",
    "PairSet",
    "Preference",
    "PreferenceSet",
    "QuestionSet",
    "RelationTable",
    "SaidText",
    "StateQuestion",
    "Template",
    "fit",
    "fit_act",
    "fit_alphasteer",
    "fit_angular",
    "fit_conceptor",
    "fit_concepts",
    "fit_detector",
    "fit_jacobian_lens",
    "fit_labels",
    "fit_low_rank",
    "fit_lrc",
    "fit_nmf",
    "fit_oracle",
    "fit_prosv",
    "fit_psr",
    "fit_reps",
    "fit_snmf",
    "fit_token",
    "fit_tuned_lens",
    "fit_two_prompts",
    "read_exercises",
    "read_labelled",
    "read_pairs",
    "read_preferences",
    "read_questions",
    "read_relations",
    "read_said",
    "said_texts",
    "transfer",
]

_HOMES = {
    "QuestionSet": "steer.fit.data.questions",
    "StateQuestion": "steer.fit.data.questions",
    "read_questions": "steer.fit.data.questions",
    "SaidText": "steer.fit.data.concepts",
    "read_said": "steer.fit.data.concepts",
    "said_texts": "steer.fit.data.concepts",
    "fit_concepts": "steer.fit.methods.trained.concepts",
    "fit_oracle": "steer.fit.methods.trained.asked_oracle",
    "Exercise": "steer.fit.data.exercises",
    "ExerciseSet": "steer.fit.data.exercises",
    "read_exercises": "steer.fit.data.exercises",
    "Labelled": "steer.fit.data.labels",
    "LabelledSet": "steer.fit.data.labels",
    "read_labelled": "steer.fit.data.labels",
    "Pair": "steer.fit.data.pairs",
    "PairSet": "steer.fit.data.pairs",
    "read_pairs": "steer.fit.data.pairs",
    "Preference": "steer.fit.data.preferences",
    "PreferenceSet": "steer.fit.data.preferences",
    "read_preferences": "steer.fit.data.preferences",
    "Marked": "steer.fit.data.prompt",
    "Fact": "steer.fit.data.relations",
    "RelationTable": "steer.fit.data.relations",
    "Template": "steer.fit.data.relations",
    "read_relations": "steer.fit.data.relations",
    "fit": "steer.fit.methods.fitting",
    "fit_act": "steer.fit.methods.linear.act",
    "fit_angular": "steer.fit.methods.linear.angular",
    "fit_conceptor": "steer.fit.methods.linear.conceptor",
    "fit_detector": "steer.fit.methods.detectors.fitting",
    "fit_psr": "steer.fit.methods.linear.psr",
    "fit_alphasteer": "steer.fit.methods.linear.alphasteer",
    "fit_low_rank": "steer.fit.methods.trained.low_rank",
    "fit_lrc": "steer.fit.methods.lrc",
    "fit_nmf": "steer.fit.methods.dictionaries.nmf",
    "fit_jacobian_lens": "steer.fit.methods.lenses.jacobian",
    "fit_token": "steer.fit.methods.lenses.token",
    "fit_tuned_lens": "steer.fit.methods.lenses.tuned_lens",
    "fit_labels": "steer.fit.methods.one_vs_rest",
    "fit_prosv": "steer.fit.methods.trained.prosv",
    "fit_reps": "steer.fit.methods.trained.reps",
    "fit_snmf": "steer.fit.methods.dictionaries.snmf",
    "transfer": "steer.fit.methods.transfer",
    "fit_two_prompts": "steer.fit.methods.two_prompts",
}


def __getattr__(name: str) -> object:
    # Imported on first use: torch takes seconds, and the requests, of which the command line makes
    # its options, need none.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'steer.fit' has no attribute {name!r}")
