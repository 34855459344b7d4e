"""What runs where: deployments, work pools, automations. Data only; `tripoise deploy` reads it."""
