"""Who does the tasks of the phases: this process, local workers, or ranks that are given a number. They change nothing of what is written."""
