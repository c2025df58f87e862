"""What an operator may choose of Steer on vLLM's server, by environment variables.

vLLM's own arguments rule everything else: host, port, keys, batch and context. The plugin's options
for the engine are in `additional_config["steer"]`, which is part of the key of vLLM's compile
cache; what concerns HTTP alone does not belong there.

| Variable | Meaning | Default |
|---|---|---|
| `STEER_REGISTRY` | The registry's folder or URL, shared by all processes | `steer-registry` |
| `STEER_CATALOGUE` | The SQLAlchemy URL of its catalogue; a folder has its own | |
| `STEER_MAX_BODY_BYTES` | The longest body of any other request, vLLM's own too | 64 MiB |
| `STEER_MAX_UPLOAD_BYTES` | The largest file that may be uploaded | 512 MiB |
| `STEER_ALLOW_INLINE_VECTORS` | Whether requests may carry vectors | true |
| `STEER_MEASURED_SHARE` | The share of steered requests whose edits are measured | 0.01 |
| `STEER_METRIC_NAMES` | How many vectors and profiles get a label of their own | 200 |
| `STEER_PLAN_CACHE_SIZE` | How many compiled plans are kept | 1024 |
| `STEER_STRENGTH_LIMIT` | `refuse` or `cap` strengths outside the calibrated range | `off` |
| `STEER_JOB_WORKERS` | How many jobs each API server runs at a time | 1 |
| `STEER_JOB_QUEUE` | How many more may wait | 16 |
| `STEER_JOBS_KEPT` | How many finished jobs are remembered | 200 |
| `STEER_JOB_DUTY` | The share of the engine's time that jobs take while requests run | 0.03 |
| `STEER_DETECTORS` | Detectors on every request, NAME or NAME:stop, commas between them | |
| `STEER_INSPECTION_WORKERS` | How many inspections each API server runs at a time | 2 |
| `STEER_INSPECTION_QUEUE` | How many more may wait | 32 |
| `STEER_READOUT_LAYERS` | The most layers that one field of read-outs names | 64 |
| `STEER_READOUT_NUMBERS` | The most numbers that are read of a token | 1024 |
| `STEER_READOUT_VALUES` | The most numbers that are read of a sequence | 4194304 |
| `STEER_CAPTURE_ROWS` | The most tokens whose states one job keeps | 16777216 |
| `STEER_CAPTURE_BYTES` | What all kept states may take of the disk; 0 keeps none | 4 GiB |
| `STEER_HUB_IMPORTS` | Whether clients may have artefacts fetched from the hub | `true` |
| `STEER_MAX_HUB_BYTES` | The largest artefact that is fetched from the hub | 512 MiB |
| `STEER_EMBEDDER` | A model that embeds labels, http://HOST/v1#model=NAME | |
| `STEER_LABELLER` | A model that makes and judges labels, likewise | |
| `STEER_EMBEDDER_KEY`, `STEER_LABELLER_KEY` | Their keys | |
| `STEER_LABELLER_QUESTIONS` | The most questions that one job asks the labeller | 4096 |
| `STEER_ALLOWED_HOSTS` | Names that a server without a key answers to, commas between them | |
| `STEER_ALLOWED_ORIGINS` | Pages that may use a server without a key | |
"""

from __future__ import annotations

from collections.abc import Mapping

from steer.engines.vllm.options import DEFAULT_REGISTRY, REGISTRY_VARIABLE
from steer.registry.location import chosen_catalogue
from steer_server.settings import MIB, VARIABLES, ServerSettings, settings_from

_BODY_BYTES = 64 * MIB
"""Larger than on Steer's own server: requests to vLLM may carry images and sound."""


def settings_of(environment: Mapping[str, str], *, model: str, served_name: str) -> ServerSettings:
    """The settings in `environment`. Raises `SpecError` naming a variable that is wrong."""
    given = {} if VARIABLES["max_body_bytes"] in environment else {"max_body_bytes": _BODY_BYTES}
    return settings_from(
        environment,
        engine="vllm",
        model=model,
        served_name=served_name,
        registry=environment.get(REGISTRY_VARIABLE, DEFAULT_REGISTRY),
        catalogue=chosen_catalogue(environment),
        **given,
    )
