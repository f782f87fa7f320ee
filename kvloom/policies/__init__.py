"""What recipes are put together from: scorers, budgets, placements."""
