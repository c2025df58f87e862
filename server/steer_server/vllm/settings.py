"""What an operator may choose of Steer on vLLM's server, by environment variables.

vLLM's own arguments rule everything else: host, port, keys, batch and context. The plugin's options
for the engine are in `additional_config["steer"]`, which is part of the key of vLLM's compile
cache; what concerns HTTP alone does not belong there.

| Variable | Meaning | Default |
|---|---|---|
| `STEER_REGISTRY` | The registry's folder or URL, shared by all processes | `steer-registry` |
| `STEER_CATALOGUE` | The SQLAlchemy URL of its catalogue; a folder has its own | |
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
| `STEER_HUB_IMPORTS` | Whether clients may have artefacts fetched from the hub | `true` |
| `STEER_MAX_HUB_BYTES` | The largest artefact that is fetched from the hub | 512 MiB |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from steer.engines.vllm.options import DEFAULT_REGISTRY, REGISTRY_VARIABLE
from steer.errors import SpecError
from steer.registry.location import chosen_catalogue
from steer_server.settings import ServerSettings

PREFIX = "STEER_"
_FIELDS = (
    "max_upload_bytes",
    "allow_inline_vectors",
    "measured_share",
    "metric_names",
    "plan_cache_size",
    "strength_limit",
    "job_workers",
    "job_queue",
    "jobs_kept",
    "job_duty",
    "hub_imports",
    "max_hub_bytes",
)
VARIABLES = {name: PREFIX + name.upper() for name in _FIELDS}
"""The environment variable of each setting."""


def settings_of(environment: Mapping[str, str], *, model: str, served_name: str) -> ServerSettings:
    """The settings in `environment`. Raises `SpecError` naming a variable that is wrong."""
    given: dict[str, Any] = {  # pydantic reads the texts
        name: environment[variable]
        for name, variable in VARIABLES.items()
        if variable in environment
    }
    try:
        return ServerSettings(
            engine="vllm",
            model=model,
            served_name=served_name,
            registry=environment.get(REGISTRY_VARIABLE, DEFAULT_REGISTRY),
            catalogue=chosen_catalogue(environment),
            **given,
        )
    except ValidationError as error:
        first = error.errors()[0]
        variable = VARIABLES[str(first["loc"][0])]
        raise SpecError(
            f"{variable}={first['input']!r}: {first['msg']}; set it to another value, or not at all"
        ) from None
