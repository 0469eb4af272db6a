"""The GPT that Megatron-core builds around our attention."""

from infini_train.model.gpt import build_stage
from infini_train.model.micro_batch import MicroBatch
from infini_train.model.parameters import ParameterPlacement, initialize_parameters, parameter_placements
from infini_train.model.stage import StageModel

__all__ = ["MicroBatch", "ParameterPlacement", "StageModel", "build_stage", "initialize_parameters", "parameter_placements"]
