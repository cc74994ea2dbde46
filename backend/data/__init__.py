"""Datasets: what lies in folders, what becomes of it, and the caches that training reads."""
