"""What Algorithm 1 does with the vectors."""
