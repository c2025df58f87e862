"""Shared by all tests: one thread, quiet libraries, deterministic hypothesis, tiny models."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# The same examples on every run, however slow the machine.
settings.register_profile(
    "steer",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=60,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steer"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--requests",
        type=int,
        default=320,
        help="how many requests the fuzz in tests/contract/test_isolation.py sends",
    )


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], torch.nn.Module]:
    """A random model of a named architecture; the same object each time, so leave it as it was."""
    from tiny_models import build

    made: dict[str, torch.nn.Module] = {}

    def get(name: str) -> torch.nn.Module:
        if name not in made:
            made[name] = build(name)
        return made[name]

    return get
