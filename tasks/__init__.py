"""Thin tasks over plain functions: sources, store, merge, evaluate, report."""
