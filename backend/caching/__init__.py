"""From datasets to caches: the work of the caching commands, with progress, stop and continuation."""
