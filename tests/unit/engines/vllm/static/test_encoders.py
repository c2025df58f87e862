"""Where kernels find the encoders of TopK SAEs."""

from __future__ import annotations

import gc
import weakref

import torch

from steer.artefacts.sae.encoders import LatentRows, TopKEncoder
from steer.batch.encoders import DeviceEncoders
from steer.engines.vllm.static.encoders import BIAS, LATENTS, READ, SIGNED, Encoders, K


def encoder(name: str, latents: int = 5, *, signed: bool = False) -> TopKEncoder:
    rows = LatentRows(torch.randn(latents, 4), torch.zeros(latents))
    return TopKEncoder(name, rows, 2, signed=signed)


def test_an_encoder_is_entered_once_and_forgotten_with_its_last_holder() -> None:
    encoders = Encoders(2, DeviceEncoders("cpu"))
    address = encoders.table.data_ptr()
    first, second = encoder("a"), encoder("b", 7)
    number = encoders.take(first)
    assert number == encoders.take(first) != encoders.take(second) > 0
    assert encoders.table[number, [LATENTS, K, SIGNED]].tolist() == [5, 2, 0]
    encoders.give_back("a")
    assert encoders.take(encoder("a")) == number
    encoders.give_back("a")
    encoders.give_back("a")
    third = encoders.take(encoder("c", 9, signed=True))
    assert third == number
    assert encoders.table[third, [LATENTS, SIGNED]].tolist() == [9, 1]
    assert encoders.table[third, READ] != encoders.table[third, BIAS] > 0
    assert encoders.table.data_ptr() == address


def test_what_lies_on_a_device_is_shared_and_kept_no_longer_than_it_is_held() -> None:
    on_device = DeviceEncoders("cpu")
    mine = on_device.of(encoder("a"))
    assert on_device.of(encoder("a")) is mine
    gone = weakref.ref(mine)
    del mine
    gc.collect()
    assert gone() is None
    assert on_device.of(encoder("a", 6)).latents == 6
