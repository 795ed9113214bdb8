"""The phases of a corpus: curate, deduplicate, tokenise, shard. Each is a list of independent tasks that any process may take."""
