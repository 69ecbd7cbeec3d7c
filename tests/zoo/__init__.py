"""Tests of visexpert.zoo."""
