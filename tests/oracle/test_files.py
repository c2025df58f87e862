"""Files that steering-vectors and tuned-lens wrote themselves, read by us."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from steer.artefacts.lens import Lens
from steer.artefacts.library import MemoryLibrary
from steer.engines.fake.engine import ByteTokenizer
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.formats.vectors.pickles import convert_pickle
from steer.inspection.logit_lens import LogitLensRequest, logit_lens

PLAIN = ImportOptions()

pytestmark = pytest.mark.slow

SITES = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def theirs(run_peer: Any, tiny_models: Mapping[str, Path], inputs: Any, folder: Path) -> Any:
    return run_peer("peers", "peer_files.py", inputs, folder=folder, model=tiny_models["llama"])


@pytest.mark.parametrize("suffix", ["pkl", "pt"])
@pytest.mark.parametrize("layer_type", SITES)
def test_pickled_vectors_have_equal_rows(
    theirs: Any, inputs: Any, folder: Path, layer_type: str, suffix: str
) -> None:
    vector = convert_pickle(folder / f"{layer_type}.{suffix}", PLAIN)
    assert vector.card.site == SITES[layer_type]
    assert vector.card.layers == (1, 2)
    for layer in (1, 2):
        assert torch.equal(vector[layer], inputs[f"layers.{layer}"])


@pytest.mark.parametrize("suffix", ["pkl", "pt"])
@pytest.mark.parametrize("layer_type", ["input_layernorm", "post_attention_layernorm"])
def test_vectors_on_norms_are_refused(
    theirs: Any, folder: Path, layer_type: str, suffix: str
) -> None:
    with pytest.raises(SteerError, match=layer_type):
        convert_pickle(folder / f"{layer_type}.{suffix}", PLAIN)


@pytest.fixture(scope="module")
def lens(theirs: Any, folder: Path) -> Lens:
    found = read_artefact(folder / "lens", PLAIN, scratch=None, unpacked_limit=0)
    assert isinstance(found, Lens)
    return found


@pytest.fixture(scope="module")
def engine(tiny_models: Mapping[str, Path]) -> Iterator[TransformersEngine]:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).eval()
    with TransformersEngine(model, ByteTokenizer(), name="tiny", rows=4, slots=4) as running:
        yield running


def test_a_translated_state_reads_as_theirs(
    theirs: Any, lens: Lens, engine: TransformersEngine
) -> None:
    for index in range(4):
        state = theirs[f"state.{index}"]
        ours = engine.unembed(lens.translated(state, index, "resid_pre"))
        torch.testing.assert_close(ours, theirs[f"lens.{index}"], atol=1e-5, rtol=1e-5)
        if index:
            # Translator N reads hidden_states[N], the output of block N - 1.
            same = engine.unembed(lens.translated(state, index - 1, "resid_post"))
            assert torch.equal(same, ours)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_a_reading_through_the_lens_has_their_distribution(
    theirs: Any, inputs: Any, lens: Lens, engine: TransformersEngine, site: str
) -> None:
    tokens = inputs["tokens"][0].tolist()
    request = LogitLensRequest.model_validate(
        {"tokens": tokens, "site": site, "lens": "tuned", "top": 20}
    )
    library = MemoryLibrary(lenses={"tuned": lens})
    result = logit_lens(engine, request, library=library)
    for cell in result.cells:
        index = cell.layer if site == "resid_pre" else cell.layer + 1
        logits = theirs["plain"] if index == 4 else theirs[f"lens.{index}"]
        expected = logits[cell.position].softmax(-1)
        for entry in cell.top:
            assert entry.probability == pytest.approx(float(expected[entry.id]), abs=1e-5)
