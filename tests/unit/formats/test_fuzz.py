"""A small part of the fuzzing in tests/support/fuzz.py, on every reader of files."""

import gc
from pathlib import Path

import pytest
from fuzz import damaged_file, read_one
from fuzz_corpus import Seed, large_seeds, seeds

CORPUS = seeds()
DAMAGED = 20


@pytest.mark.parametrize("seed", CORPUS, ids=lambda seed: seed.name)
def test_the_corpus_is_good_and_its_damaged_files_are_not_believed(
    seed: Seed, tmp_path: Path
) -> None:
    good = read_one(seed, seed.data, seed.options, tmp_path)
    assert good.result == "read"
    place = CORPUS.index(seed)
    for turn in range(DAMAGED):
        number = turn * len(CORPUS) + place
        outcome = read_one(*damaged_file(CORPUS, number), tmp_path)
        assert not outcome.result.startswith("WRONG"), (number, outcome)


def test_large_files_take_at_most_twice_their_size_in_memory(tmp_path: Path) -> None:
    for seed in large_seeds(width=1 << 14):
        read_one(seed, seed.data, seed.options, tmp_path)  # what is imported for it stays
        gc.collect()
        outcome = read_one(seed, seed.data, seed.options, tmp_path)
        assert outcome.result == "read"
        assert outcome.size > 1 << 18
        # Half precision becomes float32, twice as large, beside the mapped pages of the file.
        times = 3 if "f16" in seed.name else 2
        assert outcome.peak < times * outcome.size + (2 << 20), outcome
