"""What the server says once it is up: where it is, what it has, and a request to try."""

from __future__ import annotations

import json

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from steer_server.state import Serving

_SHOWN = 12


def banner(serving: Serving, url: str) -> Panel:
    """The block to print."""
    info = serving.engine.info
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row("URL", f"{url}/v1  (docs: {url}/docs, metrics: {url}/metrics)")
    facts.add_row(
        "Model",
        f"{serving.model_name}  "
        f"({info.architecture}, {info.n_layers} layers, width {info.d_model})",
    )
    facts.add_row("Engine", serving.engine.capabilities.engine)
    facts.add_row(
        "Vectors", _names([e.name for e in serving.registry.entries("vector", limit=999)])
    )
    facts.add_row("SAEs", _names([e.name for e in serving.registry.entries("sae", limit=999)]))
    facts.add_row("Profiles", _names([profile.name for profile in serving.registry.profiles()]))
    return Panel(
        Group(facts, Text("\nTry:"), Text(example(serving, url), style="green")),
        title="Steer",
        expand=False,
    )


def example(serving: Serving, url: str) -> str:
    """A curl command that works on this server."""
    body: dict[str, object] = {
        "model": serving.model_name,
        "messages": [{"role": "user", "content": "Tell me about your day."}],
    }
    vectors = serving.registry.entries("vector", limit=1)
    if vectors:
        body["steering"] = {"interventions": [{"kind": "add", "vector": vectors[0].name}]}
    key = " -H 'authorization: Bearer <key>'" if serving.settings.api_key else ""
    return (
        f"curl {url}/v1/chat/completions -H 'content-type: application/json'{key} \\\n"
        f"  -d '{json.dumps(body)}'"
    )


def _names(names: list[str]) -> str:
    if not names:
        return "none yet"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
