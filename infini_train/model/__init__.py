"""The GPT that Megatron-core builds around our attention."""

from infini_train.model.gpt import build_model
from infini_train.model.micro_batch import MicroBatch
from infini_train.model.parameters import ParameterPlacement, initialize_parameters, parameter_placements

__all__ = ["MicroBatch", "ParameterPlacement", "build_model", "initialize_parameters", "parameter_placements"]
