"""Forms of one operation: apply a stage of the tables to a batch of differently steered tokens."""

from steer.kernels.torch_form import apply_stage

__all__ = ["apply_stage"]
