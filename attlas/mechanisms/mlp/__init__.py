"""Mixing with matrices and gates that are learned and not made of queries and keys."""
