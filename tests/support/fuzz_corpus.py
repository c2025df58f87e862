"""Good files of every format that Steer reads: what fuzzing begins with."""

from __future__ import annotations

import base64
import io
import json
import pickle
import sys
import tarfile
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from artefacts import random_adapter, random_sae, random_vector
from foreign.sae_layouts import layouts
from gguf import GGUFWriter
from safetensors.torch import save

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.lens import Lens
from steer.artefacts.sae.saelens import save_directory
from steer.formats.importing import read_artefact
from steer.formats.inline import decode_inline
from steer.formats.options import ImportOptions
from steer.formats.vectors.gguf import write_gguf
from steer.formats.vectors.pickles import convert_pickle
from steer.spec import InlineVector

Parse = Callable[[Path, ImportOptions], Any]
WIDTH = 16
# What the names of folders say, which lie in none here.
_TOLD: Mapping[str, Mapping[str, Any]] = {
    "Gemma Scope 1 npz": {"layers": (3,)},
    "Qwen Scope": {"origin": "hf://Qwen/SAE-Res-W32K-L0_5/layer3.sae.pt"},
    **{
        f"sparsify {kind}": {"layers": (3,), "site": "mlp_in"}
        for kind in ("topk", "groupmax", "transcoder")
    },
}
UNPACKED_LIMIT = 64 << 20


@dataclass(frozen=True)
class Seed:
    """A good file and how it is read. `members` are the files of a folder, with one to mutate."""

    name: str
    data: bytes
    parse: Parse
    options: ImportOptions = ImportOptions()  # noqa: RUF009 - frozen
    beside: Mapping[str, bytes] | None = None
    filename: str = "file"


def parse_file(path: Path, options: ImportOptions) -> Any:
    """As the registry imports: with a place to unpack archives to."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "scratch"
        return read_artefact(path, options, scratch=scratch, unpacked_limit=UNPACKED_LIMIT)


def parse_folder(path: Path, options: ImportOptions) -> Any:
    return read_artefact(path.parent, options, scratch=None, unpacked_limit=UNPACKED_LIMIT)


def parse_pickle(path: Path, options: ImportOptions) -> Any:
    return convert_pickle(path, options)


def parse_inline(path: Path, options: ImportOptions) -> Any:
    # Base64 is ASCII: what is not would be refused by the JSON reader before.
    data = path.read_bytes().decode("latin-1").encode("ascii", "replace").decode()
    return decode_inline(InlineVector.model_construct(layer=3, data=data))


def seeds() -> list[Seed]:
    """All of them, always the same."""
    torch.manual_seed(0)
    return [
        *_safetensors(),
        *_gguf(),
        *_arrays(),
        *_saes(),
        *_torch(),
        *_folders(),
        *_pickles(),
        Seed("inline", base64.b64encode(save({"layers.3": torch.randn(WIDTH)})), parse_inline),
    ]


def large_seeds(width: int = 4096) -> list[Seed]:
    """32 layers, of width 4096 512 KiB as float32, by format: for the bound on memory."""
    vector = random_vector(1, *range(1, 33), width=width)
    rows = {str(n): row for n, row in vector.directions.items()}
    arrays = {n: row.numpy() for n, row in rows.items()}
    halves = {n: row.half() for n, row in rows.items()}
    lists = {n: row.tolist() for n, row in rows.items()}
    sae = random_sae("jumprelu", width=width // 2)
    lens = _translators(8, width // 16)
    return [
        Seed("large canonical", vector.to_bytes(), parse_file),
        Seed("large safetensors f16", save(halves), parse_file),
        Seed("large gguf", _written(lambda path: write_gguf(vector, path)), parse_file),
        Seed("large npz", _npz(np.savez, arrays), parse_file),
        Seed("large svec", json.dumps({"directions": lists}).encode(), parse_file),
        Seed("large torch", _saved(rows), parse_file),
        Seed("large sae", sae.to_bytes(), parse_file),
        Seed("large lens zip", _zipped(_lens_folder(lens)), parse_file),
    ]


def _safetensors() -> Iterator[Seed]:
    vector = random_vector(1, 1, 3, width=WIDTH, description="d", default_layers=(3,))
    yield Seed("canonical vector", vector.to_bytes(), parse_file)
    yield Seed("canonical adapter", random_adapter(1, 1, 2).to_bytes(), parse_file)
    yield Seed("canonical lens", Lens.of(_translators(3, 8)).to_bytes(), parse_file)
    jacobians = {n: torch.randn(8, 8) for n in (1, 3)}
    yield Seed("canonical jacobians", Lens.of_jacobians(jacobians).to_bytes(), parse_file)
    for architecture in ("standard", "jumprelu", "topk"):
        yield Seed(f"canonical {architecture}", random_sae(architecture).to_bytes(), parse_file)
    rows = {f"layers.{n}": torch.randn(WIDTH).to(torch.bfloat16) for n in (1, 2)}
    yield Seed("safetensors rows", save(rows), parse_file)
    yield Seed("safetensors matrix", save({"v": torch.randn(4, WIDTH)}), parse_file)
    yield Seed(
        "safetensors row", save({"v": torch.randn(WIDTH)}), parse_file, ImportOptions(layers=(2,))
    )
    parts = random_adapter(1, 1, 2).parts
    reft = {
        f"layers.{n}.{name}": part.contiguous()
        for n, three in parts.items()
        for name, part in zip(("rotation", "weight", "bias"), three, strict=True)
    }
    yield Seed("loreft", save(reft), parse_file)


def _gguf() -> Iterator[Seed]:
    vector = random_vector(1, 1, 3, width=WIDTH)
    yield Seed("gguf ours", _written(lambda path: write_gguf(vector, path)), parse_file)
    for name, first, keys, options in (
        ("repeng", 1, {}, ImportOptions()),
        ("easysteer", 0, {"method": "caa", "token_pos": "last"}, ImportOptions()),
        ("generator", 1, {"int32": "yes"}, ImportOptions(source="llama-cpp-generator")),
    ):
        data = _written(lambda path, first=first, keys=keys: _foreign_gguf(path, first, keys))
        yield Seed(f"gguf {name}", data, parse_file, options)
    yield Seed("gguf projection", _written(_projection_gguf), parse_file)


def _projection_gguf(path: Path) -> None:
    """GLP of version 2: two unit rows for each of two layers."""
    writer = GGUFWriter(path, "controlvector")
    writer.add_uint32("glp.spec_version", 2)
    writer.add_string("glp.mode", "project")
    writer.add_uint32("glp.rank", 2)
    writer.add_bool("glp.orthonormal", True)
    writer.add_float32("glp.alpha_default", 2.0)
    writer.add_string("glp.dir_scales", "1,0.5")
    for layer in (1, 3):
        for place, row in enumerate(np.eye(2, WIDTH, dtype=np.float32)):
            writer.add_tensor(f"direction.{layer}" + (f".{place}" if place else ""), row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _foreign_gguf(path: Path, first: int, keys: Mapping[str, str]) -> None:
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    add = writer.add_int32 if "int32" in keys else writer.add_uint32
    add("controlvector.layer_count", 2)
    writer.add_array("controlvector.more", [1, 2, 3])
    for key, value in keys.items():
        writer.add_string(f"controlvector.{key}", value)
    for layer in (first, first + 1):
        writer.add_tensor(f"direction.{layer}", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _arrays() -> Iterator[Seed]:
    rows = {f"layer_{n}": np.random.default_rng(n).normal(size=WIDTH) for n in (1, 2)}
    yield Seed("npz rows", _npz(np.savez, rows), parse_file)
    yield Seed("npz deflated", _npz(np.savez_compressed, rows), parse_file)
    matrix = {"v": np.asfortranarray(np.random.default_rng(0).normal(size=(4, WIDTH)))}
    yield Seed("npz matrix", _npz(np.savez, matrix), parse_file, ImportOptions(source="blocks"))
    npy = io.BytesIO()
    np.save(npy, matrix["v"])
    yield Seed("npy matrix", npy.getvalue(), parse_file, ImportOptions(source="blocks"))
    svec = {
        "model_type": "llama",
        "directions": {"1": [0.5, -1e-3, 2], "2": [[1, 2, 3.25]]},
        "explained_variances": {"1": 0.5, "2": 0.25},
    }
    yield Seed("svec", json.dumps(svec).encode(), parse_file)
    lists = {f"layers.{n}": torch.randn(WIDTH).tolist() for n in (1, 2)}
    yield Seed("json lists", json.dumps(lists).encode(), parse_file)


def _torch() -> Iterator[Seed]:
    rows = {1: torch.randn(WIDTH), "layer_2": torch.randn(WIDTH).to(torch.float16)}
    yield Seed("torch rows", _saved(rows), parse_file)
    yield Seed(
        "torch persona",
        _saved(torch.randn(5, WIDTH)),
        parse_file,
        ImportOptions(source="persona-vectors"),
    )
    yield Seed(
        "torch mean_diffs",
        _saved(torch.randn(3, 4, WIDTH)),
        parse_file,
        ImportOptions(source="refusal-direction", position=-1),
    )
    parameter = torch.nn.Parameter(torch.randn(WIDTH))
    yield Seed("torch row", _saved({"3": parameter}), parse_file)
    yield Seed("torch axis", _saved({"axis": torch.randn(4, WIDTH), "n_roles": 2}), parse_file)
    yield Seed("torch jacobian lens", _saved(_jacobian_lens(3, 8)), parse_file)
    sums = {n: torch.randn(8, 8) for n in range(3)}
    checkpoint = {"jacobian_sum": sums, "n_done": 4, "next_idx": 5, "source_layers": [0, 1, 2]}
    yield Seed("torch jacobian checkpoint", _saved(checkpoint), parse_file)
    capping = {
        "vectors": {"a": {"layer": 2, "vector": torch.randn(WIDTH)}},
        "experiments": [{"id": "x", "interventions": [{"vector": "a", "cap": 1.5}]}],
    }
    yield Seed("torch capping", _saved(capping), parse_file)


def _folders() -> Iterator[Seed]:
    folders = {
        "refusal": {
            "direction.pt": _saved(torch.randn(WIDTH)),
            "direction_metadata.json": b'{"pos": -1, "layer": 2}',
        },
        "lens": _lens_folder(_translators(3, 8)),
        "jacobian lens": {
            "m_jacobian_lens_n100.pt": _saved(_jacobian_lens(3, 8)),
            "config.yaml": b"hf_model_name: some/model\nfit:\n  n_prompts: 100\n",
        },
        "pyreft": {
            "intkey_layer_2_comp_block_output_unit_pos_nunit_1#0.bin": _saved(
                {
                    "weight": torch.randn(2, WIDTH),
                    "bias": torch.randn(2),
                    "rotate_layer": torch.eye(WIDTH)[:, :2].contiguous(),
                }
            ),
            "config.json": b'{"representations": [[2, "block_output", "pos", 1]], '
            b'"intervention_types": ["pyreft.interventions.LoreftIntervention"]}',
        },
        "saelens": _saelens_folder(),
    }
    for name, members in folders.items():
        for filename, data in members.items():
            beside = {other: held for other, held in members.items() if other != filename}
            yield Seed(
                f"folder {name}: {filename}", data, parse_folder, beside=beside, filename=filename
            )
        yield Seed(f"zip {name}", _zipped(members), parse_file)
        yield Seed(f"zip {name} deflated", _zipped(members, zipfile.ZIP_DEFLATED), parse_file)
        yield Seed(f"tar {name}", _tarred(members, "w"), parse_file)
        yield Seed(f"tar.gz {name}", _tarred(members, "w:gz"), parse_file)


def _saes() -> Iterator[Seed]:
    for layout in layouts():
        for filename, data in layout.files.items():
            beside = {other: held for other, held in layout.files.items() if other != filename}
            parse = parse_file if layout.is_file else parse_folder
            if "/" not in "".join(layout.files):
                yield Seed(
                    f"sae {layout.name}: {filename}",
                    data,
                    parse,
                    options=replace(layout.options, **_TOLD.get(layout.name, {})),
                    beside=beside,
                    filename=filename,
                )


def _pickles() -> Iterator[Seed]:
    rows = {1: torch.randn(WIDTH), 2: torch.randn(WIDTH)}
    with steering_vector_class() as made:
        vector = made(rows, "mlp")
        yield Seed("pickle torch", _saved(vector), parse_pickle)
        for protocol in (2, 4):
            data = pickle.dumps(vector, protocol=protocol)
            yield Seed(f"pickle {protocol}", data, parse_pickle)
    arrays = {layer: row.numpy() for layer, row in rows.items()}
    yield Seed("pickle arrays torch", _saved(arrays), parse_pickle)
    for protocol in (2, 4, 5):
        data = pickle.dumps(arrays, protocol=protocol)
        yield Seed(f"pickle arrays {protocol}", data, parse_pickle)


@contextmanager
def steering_vector_class() -> Iterator[Callable[..., Any]]:
    """A class whose pickles name steering_vectors.SteeringVector, which is not installed here."""
    module_name = "steering_vectors.steering_vector"

    class SteeringVector:
        def __init__(self, rows: dict[int, torch.Tensor], layer_type: str) -> None:
            self.layer_activations, self.layer_type = rows, layer_type

    SteeringVector.__module__, SteeringVector.__qualname__ = module_name, "SteeringVector"
    module = types.ModuleType(module_name)
    module.SteeringVector = SteeringVector  # type: ignore[attr-defined]
    added = {"steering_vectors": types.ModuleType("steering_vectors"), module_name: module}
    before = {name: sys.modules.get(name) for name in added}
    sys.modules.update(added)
    try:
        yield SteeringVector
    finally:
        for name, was in before.items():
            if was is None:
                del sys.modules[name]
            else:
                sys.modules[name] = was


def _translators(layers: int, width: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    return {n: (torch.randn(width, width), torch.randn(width)) for n in range(layers)}


def _jacobian_lens(layers: int, width: int) -> dict[str, Any]:
    matrices = {n: torch.randn(width, width).half() for n in range(layers)}
    return {"J": matrices, "n_prompts": 100, "source_layers": [*matrices], "d_model": width}


def _lens_folder(parts: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, bytes]:
    state = {f"{n}.weight": weight for n, (weight, _) in parts.items()}
    state |= {f"{n}.bias": bias for n, (_, bias) in parts.items()}
    config = {"d_model": len(parts[0][1]), "num_hidden_layers": len(parts), "bias": True}
    return {"config.json": json.dumps(config).encode(), "params.pt": _saved(state)}


def _saelens_folder() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save_directory(random_sae("jumprelu"), Path(folder))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _npz(write: Callable[..., None], arrays: Mapping[str, Any]) -> bytes:
    stream = io.BytesIO()
    write(stream, **arrays)
    return stream.getvalue()


def _written(write: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def _zipped(members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(f"folder/{name}"), data, method)
    return stream.getvalue()


def _tarred(members: Mapping[str, bytes], mode: Any) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(f"folder/{name}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def is_sound(artefact: Any) -> bool:
    """Whether what was read is an artefact that survives its own canonical file."""
    back = type(artefact).from_bytes(artefact.to_bytes())
    finite = True
    if isinstance(artefact, ControlVector):
        finite = all(bool(row.isfinite().all()) for row in artefact.directions.values())
    return finite and bool(back.card == artefact.card)
