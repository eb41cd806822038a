"""How a batch of rows is computed on what there is: fused layers, CUDA graphs, layers on disk or behind the bus."""
