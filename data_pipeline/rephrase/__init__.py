"""Rephrasing: documents in, what a language model makes of them out, and never the same request twice."""
