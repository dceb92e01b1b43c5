"""What the experiments share, one subject a file. Nothing here knows an architecture or an experiment."""
