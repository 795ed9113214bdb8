"""Number formats, quantisers, low-precision linears and counter-based randomness. Imports only torch (and triton)."""
