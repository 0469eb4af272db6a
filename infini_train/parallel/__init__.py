"""Layout and process groups, the segment schedule, its transport, the pipeline that runs it, and the DeepSpeed engine."""
