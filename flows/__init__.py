"""Composition: what runs after what; the parameter models; the command line."""
