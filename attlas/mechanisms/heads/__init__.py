"""Mechanisms that choose among heads."""
