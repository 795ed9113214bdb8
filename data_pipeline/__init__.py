"""Documents in, Arrow shards out, and the order in which training reads them."""
