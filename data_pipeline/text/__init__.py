"""Statistics of text over whole Arrow batches, compiled: words, lines, n-grams, shingles. No Python object per word or n-gram."""
