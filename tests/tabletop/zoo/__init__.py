"""Tests of visexpert.tabletop.zoo."""
