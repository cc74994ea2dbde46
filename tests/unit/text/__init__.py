"""Tests of backend.text."""
