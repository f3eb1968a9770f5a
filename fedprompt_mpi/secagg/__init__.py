"""Secure aggregation: rank 0 learns the sum of the clients' updates, and no single one."""
