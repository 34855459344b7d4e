"""Deploying: what `deployments/` declares becomes what a Prefect server has, and nothing else stays."""
