"""What the experiments share, one subject a file. Nothing here imports a model or an experiment."""
