"""Selection: which documents teach. Losses of models on documents, predictive strength, selectors, and their judge's bookkeeping."""
