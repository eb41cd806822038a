"""From a checkpoint to a model that is ready: options, device map, assembly; and back, saving."""
