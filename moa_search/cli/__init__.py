"""The commands: thin shells around `moa_search.api`."""
