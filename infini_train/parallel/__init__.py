"""Distributed execution: layout and process groups, segment schedule, stage transport, pipeline, and DeepSpeed engine."""
