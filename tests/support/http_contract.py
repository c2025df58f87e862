"""What schemathesis holds the server to, in tests/server/test_openapi.py and in `make fuzz-http`.

All its own checks, one of them made more exact: what fits the schema must be taken. JSON Schema
cannot say what the fields of a request have to do with each other, with the model that is served or
with a file that comes along. What is refused for that has a code of its own; nothing else may be
refused.
"""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

OF_THE_MODEL = frozenset(
    {
        "context_length_exceeded",
        "empty_prompt",
        "feature_out_of_range",
        "invalid_messages",
        "layer_out_of_range",
        "no_gradients",
        "no_second_model",
        "not_one_token",
        "position_out_of_range",
        "text_not_found",
        "token_out_of_range",
        "too_many_choices",
        "unknown_token",
        "unsupported_inspection",  # the fake engine tells no attention
        "unsupported_parameter",
        "unsupported_source",
    }
)
OF_THE_REGISTRY = frozenset(
    f"unknown_{kind}"
    for kind in ("vector", "sae", "low_rank", "lens", "affine", "detector", "oracle", "probe")
) | {"no_vectors", "unknown_job"}
OF_A_FILE = frozenset(
    {
        "invalid_file",
        "empty_file",
        "unknown_format",
        "unknown_layout",
        "unsupported_site",
        "wrong_kind",
        "invalid_name",
    }
)
OF_DATA = frozenset(
    {
        "invalid_pairs",
        "invalid_texts",
        "invalid_scorer",
        "invalid_labels",
        "invalid_relations",
        "invalid_examples",
        "invalid_exercises",
        "invalid_preferences",
        "no_examples",
        "no_prompts",
        "unknown_label",
        "too_few_texts",  # of each label, and equal ones count once
        "too_few_safe_texts",
        "invalid_base64",
    }
)
OF_THE_OPERATOR = frozenset({"no_embedder", "no_labeller"})
"""What is there only where the operator has named a model for it."""
OF_EACH_OTHER = frozenset(
    {
        "gate_after_edit",
        "invalid_value",
        "invalid_spec",
        "invalid_option",
        "no_heat_map",
        "no_scorer",
        "duplicate_detector",
        "nothing_to_compare",
        "one_filler",
        "too_few_states",
        "unsupported_gate",
    }
)
"""Two bounds of which one must be the smaller, two fields that need each other, and their like."""

REFUSED = OF_THE_MODEL | OF_THE_REGISTRY | OF_A_FILE | OF_DATA | OF_THE_OPERATOR | OF_EACH_OTHER


@schemathesis.check
def valid_requests_are_taken(ctx: Any, response: Any, case: Any) -> bool | None:
    """`positive_data_acceptance`, but for what no schema can say."""
    if response.status_code in (400, 413):
        error = response.json()["error"]
        if error["code"] in REFUSED:
            return None
    return positive_data_acceptance(ctx, response, case)


@schemathesis.check
def invalid_requests_are_refused(ctx: Any, response: Any, case: Any) -> bool | None:
    """`negative_data_rejection`, but for forms, whose fields are texts whatever they hold."""
    if case.media_type == "multipart/form-data":
        return None
    return negative_data_rejection(ctx, response, case)


CHECKS = [valid_requests_are_taken, invalid_requests_are_refused]
REPLACED = [positive_data_acceptance, negative_data_rejection]
