"""All of vLLM's internals that Steer leans on, and whether this vLLM has them:

    python -m steer.engines.vllm.internals

prints a line for each that has moved, with file and name, and fails if there is one. Processes of
an engine check those that they use when they start (`seams.check`).
"""

from __future__ import annotations

import sys

from steer.engines.vllm.seams import Seam, version

_CORE, _WORKER = "vllm.v1.core", "vllm.v1.worker"
_SCHEDULER = f"{_CORE}.sched.scheduler"
_V1, _V2 = f"{_WORKER}.gpu_model_runner", f"{_WORKER}.gpu.model_runner"
_ROUTES = "vllm.entrypoints.openai"

HOLD, FREE = "_handle_blocked_waiting_request", "_free_request"
DISPATCH_V1 = "_determine_batch_execution_and_padding"
DISPATCH_V2 = "dispatch_cg_and_sync_dp"
"""Choose the graph of a pass, or none; the second agrees on it with other data-parallel ranks."""

CACHE_KEYS = (
    Seam(
        f"{_CORE}.kv_cache_utils",
        "generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
    ),
)
FRONT = (
    Seam(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        (
            "self",
            "request_id",
            "prompt",
            "params",
            "supported_tasks",
            "arrival_time",
            "lora_request",
            "tokenization_kwargs",
            "trace_headers",
            "priority",
            "data_parallel_rank",
            "resumable",
            "session_id",
            "kv_hints",
        ),
    ),
)
CORE = (Seam("vllm.v1.engine.core", "EngineCore.preprocess_add_request", ("self", "request")),)
SCHEDULER = (
    Seam(_SCHEDULER, f"Scheduler.{HOLD}", ("self", "request")),
    Seam(_SCHEDULER, f"Scheduler.{FREE}", ("self", "request", "delay_free_blocks")),
    Seam(_SCHEDULER, "Scheduler.add_request", ("self", "request")),
    Seam(_SCHEDULER, "Scheduler.schedule", ("self", "throttle_prefills"), mentions=(HOLD,)),
    Seam(
        _SCHEDULER,
        "Scheduler.finish_requests",
        ("self", "request_ids", "finished_status"),
        mentions=(FREE,),
    ),
    Seam(
        _SCHEDULER,
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        mentions=(FREE,),
    ),
)
RUNNER_V1 = (
    Seam(
        _V1,
        "GPUModelRunner._model_forward",
        takes=("input_ids", "positions", "intermediate_tensors", "inputs_embeds"),
    ),
    Seam(_V1, f"GPUModelRunner.{DISPATCH_V1}", takes=("force_eager",)),
    Seam(_V1, "GPUModelRunner.execute_model", mentions=("_model_forward", DISPATCH_V1)),
    Seam(_V1, "GPUModelRunner._dummy_run", takes=("force_attention", "is_profile", "skip_eplb")),
    Seam(
        f"{_WORKER}.gpu_input_batch",
        "InputBatch.__init__",
        mentions=("num_computed_tokens_cpu", "token_ids_cpu"),
    ),
    Seam(f"{_WORKER}.gpu_input_batch", "InputBatch.req_ids"),
    Seam(_V1, "GPUModelRunner.__init__", mentions=("use_async_spec_decode", "positions")),
)
RUNNER_V2 = (
    Seam(
        _V2,
        "GPUModelRunner.execute_model",
        mentions=("model_state", "prepare_inputs", DISPATCH_V2),
    ),
    Seam(_V2, DISPATCH_V2, takes=("need_eager",)),
    Seam(_V2, "GPUModelRunner.add_requests", ("self", "scheduler_output")),
    Seam(
        f"{_WORKER}.gpu.input_batch",
        "InputBatch",
        fields=(
            "req_ids",
            "num_scheduled_tokens",
            "num_computed_tokens_np",
            "query_start_loc_np",
            "num_tokens",
            "num_draft_tokens_per_req",
            "input_ids",
            "positions",
        ),
    ),
)
STAGES = (
    Seam(
        f"{_WORKER}.gpu_worker",
        "Worker.execute_model",
        mentions=("irecv_tensor_dict", "isend_tensor_dict", "AsyncIntermediateTensors"),
    ),
)
"""What hands states from one stage of a pipeline to the next."""
ADAPTERS = (
    Seam(
        f"{_WORKER}.lora_model_runner_mixin",
        "LoRAModelRunnerMixin._set_active_loras",
        (
            "self",
            "prompt_lora_mapping",
            "token_lora_mapping",
            "lora_requests",
            "mapping_type",
        ),
    ),
)
OUTPUTS = (
    Seam(
        "vllm.v1.engine.output_processor",
        "OutputProcessor.process_outputs",
        takes=("engine_core_outputs",),
        mentions=("kv_transfer_params",),
    ),
)
"""What takes the engine's outputs apart for those who wait for them."""
ATTENTION = (
    Seam(
        "vllm.v1.attention.backend",
        "AttentionImpl.forward",
        takes=("query", "key", "value", "output"),
    ),
    Seam(
        "vllm.model_executor.layers.attention.attention",
        "unified_attention_with_output",
        takes=("query", "key", "value", "output"),
        mentions=("impl", "forward"),
    ),
    Seam(
        "vllm.model_executor.layers.attention.attention",
        "Attention.__init__",
        mentions=("impl", "sliding_window", "static_forward_context"),
    ),
)
"""What hands queries, keys and values to the kernel that attends."""
RANKS = (
    Seam(
        "vllm.v1.engine.core_client",
        "AsyncMPClient._call_utility_async",
        ("self", "method", "args", "engine"),
        mentions=("utility_results",),
    ),
    Seam("vllm.v1.engine.core_client", "MPClient.__init__", mentions=("core_engines",)),
)
"""What several engines behind one client are asked by."""
SERVER = (
    *(
        Seam(f"{_ROUTES}.{package}.api_router", name, ("request", "raw_request"))
        for package, name in (
            ("chat_completion", "create_chat_completion"),
            ("completion", "create_completion"),
            ("responses", "create_responses"),
        )
    ),
    Seam(f"{_ROUTES}.models.serving", "OpenAIServingModels.load_lora_adapter", takes=("request",)),
    Seam("vllm.entrypoints.serve", "create_error_response", takes=("message", "err_type")),
)

ALL = (
    *CACHE_KEYS,
    *FRONT,
    *CORE,
    *SCHEDULER,
    *RUNNER_V1,
    *RUNNER_V2,
    *STAGES,
    *ADAPTERS,
    *OUTPUTS,
    *ATTENTION,
    *RANKS,
    *SERVER,
)


def main() -> int:
    """Prints what has moved; how many seams that are."""
    moved = [line for seam in ALL if (line := seam.moved()) is not None]
    print(f"vLLM {version()}: {len(ALL) - len(moved)} of {len(ALL)} as expected", *moved, sep="\n")
    return len(moved)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
