"""BIG-Bench Hard: a language model that adapts to a task by its demonstrations."""
