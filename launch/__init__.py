"""The command line, the launchers and what needs several rooms at once."""
