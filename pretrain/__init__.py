"""The model, the training loop, growth, checkpoints, conversion, evaluation and the run's report."""
