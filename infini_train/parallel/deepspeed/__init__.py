"""DeepSpeed under the segment pipeline: engine, optimizer state, gradients, learning rate."""
