"""Numerics and checkpoint files of merging. Knows torch and safetensors, nothing of orchestration or networks."""
