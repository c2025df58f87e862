"""Fitting vectors, adapters and dictionaries from data, and measuring what they do."""

from steer.fit.data.exercises import Exercise, ExerciseSet, read_exercises
from steer.fit.data.labels import Labelled, LabelledSet, read_labelled
from steer.fit.data.pairs import Pair, PairSet, read_pairs
from steer.fit.data.relations import Fact, RelationTable, Template, read_relations
from steer.fit.methods.fitting import fit
from steer.fit.methods.low_rank import fit_low_rank
from steer.fit.methods.lrc import fit_lrc
from steer.fit.methods.nmf import fit_nmf
from steer.fit.methods.one_vs_rest import fit_labels
from steer.fit.methods.snmf import fit_snmf
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
    "RelationTable",
    "Template",
    "fit",
    "fit_labels",
    "fit_low_rank",
    "fit_lrc",
    "fit_nmf",
    "fit_snmf",
    "fit_two_prompts",
    "read_exercises",
    "read_labelled",
    "read_pairs",
    "read_relations",
    "transfer",
]
