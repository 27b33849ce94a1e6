"""The page of a sweep: what is read, how it is packed, and the scripts that show it."""
