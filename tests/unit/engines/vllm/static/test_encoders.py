"""Where kernels find the encoders of TopK SAEs."""

from __future__ import annotations

import gc
import weakref

import torch

from steer.batch.cutoffs import DeviceCutoffs
from steer.edits import TopKCutoff
from steer.engines.vllm.static.encoders import BIAS, LATENTS, READ, Encoders, K


def cutoff(name: str, latents: int = 5) -> TopKCutoff:
    return TopKCutoff(name, torch.randn(latents, 4, dtype=torch.float64), torch.zeros(latents), 2)


def test_an_encoder_is_entered_once_and_forgotten_with_its_last_holder() -> None:
    encoders = Encoders(2, DeviceCutoffs("cpu"))
    address = encoders.table.data_ptr()
    first, second = cutoff("a"), cutoff("b", 7)
    number = encoders.take(first)
    assert number == encoders.take(first) != encoders.take(second) > 0
    assert encoders.table[number, [LATENTS, K]].tolist() == [5, 2]
    encoders.give_back("a")
    assert encoders.take(cutoff("a")) == number
    encoders.give_back("a")
    encoders.give_back("a")
    third = encoders.take(cutoff("c", 9))
    assert third == number
    assert encoders.table[third, LATENTS] == 9
    assert encoders.table[third, READ] != encoders.table[third, BIAS] > 0
    assert encoders.table.data_ptr() == address


def test_what_lies_on_a_device_is_shared_and_kept_no_longer_than_it_is_held() -> None:
    cutoffs = DeviceCutoffs("cpu")
    mine = cutoffs.of(cutoff("a"))
    assert mine.read.dtype == torch.float32
    assert cutoffs.of(cutoff("a")) is mine
    gone = weakref.ref(mine)
    del mine
    gc.collect()
    assert gone() is None
    assert cutoffs.of(cutoff("a", 6)).read.shape == (6, 4)
