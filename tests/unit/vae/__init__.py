"""Tests of backend.vae."""
