"""Caching from the page: the state of a dataset's caches, what is left to do, and the runs that do it."""
