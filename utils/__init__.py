"""What the experiments share, one subject per file. Nothing here imports a model or an experiment."""
