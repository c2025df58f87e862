"""A GGUF model in float32: the numbers that its quantised matrices stand for, unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize

_ARCHITECTURE = "general.architecture"
_FILE_TYPE = "general.file_type"


def dequantised(source: Path, target: Path) -> Path:
    """Writes `source` to `target` with every tensor in float32; what the file says of itself is
    kept. llama.cpp then computes in float32 what other programs compute of the same file."""
    reader = GGUFReader(source)
    fields = {key: one for key, one in reader.fields.items() if not key.startswith("GGUF.")}
    writer = GGUFWriter(target, fields.pop(_ARCHITECTURE).contents())
    try:
        for key, field in fields.items():
            content = LlamaFileType.ALL_F32 if key == _FILE_TYPE else field.contents()
            kind = field.types[0]
            inner = field.types[-1] if kind is GGUFValueType.ARRAY else None
            writer.add_key_value(key, content, kind, sub_type=inner)
        for tensor in reader.tensors:
            weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            writer.add_tensor(tensor.name, weights)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return target
