"""What the server says once it is up: where it is, what it has, and a request to try."""

from __future__ import annotations

import json

from rich.panel import Panel
from rich.table import Table

from steer.artefacts.kinds import KINDS
from steer.engines.plans import plans_of
from steer.errors import SteerError
from steer.plan.cache import PlanCache
from steer.spec import Add, SteeringSpec
from steer_server.generation.chat_prompt import chat_prompt
from steer_server.generation.request_models import ChatRequest
from steer_server.http.origin import is_loopback
from steer_server.settings import ServerSettings
from steer_server.state import Serving

_SHOWN = 12
_LISTED = 999


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
    for row in KINDS:
        found = serving.registry.entries(row.name, limit=_LISTED)
        facts.add_row(row.title, _names([entry.name for entry in found]))
    facts.add_row("Profiles", _names([profile.name for profile in serving.registry.profiles()]))
    facts.add_row("Open to", _open_to(serving.settings))
    return Panel(facts, title="Steer", subtitle="try the command below", expand=False)


def _open_to(settings: ServerSettings) -> str:
    """Who may use the server."""
    where = "this machine" if is_loopback(settings.host) else f"every machine ({settings.host})"
    if settings.api_key is not None:
        return f"{where}, with the key"
    return f"{where}, without a key"


def example(serving: Serving, url: str) -> str:
    """A curl command that works on this server: a steered chat where a vector steers this model,
    otherwise an upload."""
    key = " -H 'authorization: Bearer <key>'" if serving.settings.api_key else ""
    name = _suitable(serving)
    if name is None:
        return f"curl {url}/v1/steering/vectors{key} -F file=@vector-of-this-model.gguf"
    steering = {"interventions": [{"kind": "add", "vector": name}]}
    return (
        f"curl {url}/v1/chat/completions -H 'content-type: application/json'{key} \\\n"
        f"  -d '{json.dumps({**_chat(serving), 'steering': steering})}'"
    )


def _chat(serving: Serving) -> dict[str, object]:
    return {
        "model": serving.model_name,
        "messages": [{"role": "user", "content": "Tell me about your day."}],
    }


def _suitable(serving: Serving) -> str | None:
    """A registered vector that steers the example as it is: first one that was made for this model
    and measured on it."""
    info = serving.engine.info
    cards = [entry.card for entry in serving.registry.entries("vector", limit=_LISTED)]
    fitting = [
        card
        for card in cards
        if card.site in info.sites
        and card.width == info.width(card.site)
        and max(card.layers) < info.n_layers
    ]
    fitting.sort(key=lambda card: (card.model is None, card.calibration is None))
    # A cache of its own: what is tried here is none of the plans that the metrics count.
    plans = plans_of(serving.engine, serving.registry, policy=serving.settings.spec_policy)
    try:
        prompt = tuple(chat_prompt(serving, ChatRequest.model_validate(_chat(serving))))
    except SteerError:
        return None  # a model that is not for chats
    return next((card.name for card in fitting if _steers(plans, card.name, prompt)), None)


def _steers(plans: PlanCache, name: str, prompt: tuple[int, ...]) -> bool:
    try:
        plan = plans.plan(SteeringSpec(interventions=(Add(vector=name),)))
    except SteerError:
        return False
    # The first generated token is the first one that the answer's length cannot take away.
    return plan.first_steered(prompt, len(prompt) + 1) is not None


def _names(names: list[str]) -> str:
    if not names:
        return "none yet"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
