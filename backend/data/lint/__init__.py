"""Looks datasets over before training: what is wrong with files and captions, with numbers and what to do."""
