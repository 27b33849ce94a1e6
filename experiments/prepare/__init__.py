"""Files that are made once: each module writes some of those that the repository holds."""
